// The instruction-set level of the kernels that this process uses.
#pragma once

#include <string>
#include <vector>

#include "kernels.hpp"

namespace nextquill {

// The levels that this machine can run, best first.
const std::vector<const KernelTable*>& available_kernels();

// The level in use: the best one, unless `use_kernels` chose another.
const KernelTable& current_kernels();

// Throws std::invalid_argument if the name is unknown or this machine cannot run the level.
void use_kernels(const std::string& name);

}  // namespace nextquill
