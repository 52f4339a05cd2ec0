// Which level of the kernels this process uses.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace nextquill {

// The levels this machine can run, best first.
const std::vector<const KernelTable*>& available_kernels();

// The level in use: the best one, unless `use_kernels` chose another.
const KernelTable& current_kernels();

// Throws std::invalid_argument if this machine cannot run the level or there is none of that name.
void use_kernels(const std::string& name);

}  // namespace nextquill
