#include "isa.hpp"

#include <atomic>
#include <stdexcept>

namespace nextquill {
namespace {

std::vector<const KernelTable*> detect() {
    std::vector<const KernelTable*> found;
#ifdef NEXTQUILL_X86_64
    // These functions also ask the operating system, which has to save the wider registers.
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f")) found.push_back(&kAvx512Kernels);
    if (avx2) found.push_back(&kAvx2Kernels);
#endif
    found.push_back(&kBaselineKernels);
    return found;
}

std::atomic<const KernelTable*>& chosen() {
    static std::atomic<const KernelTable*> kernels{available_kernels().front()};
    return kernels;
}

}  // namespace

const std::vector<const KernelTable*>& available_kernels() {
    static const std::vector<const KernelTable*> kernels = detect();
    return kernels;
}

const KernelTable& current_kernels() { return *chosen().load(std::memory_order_relaxed); }

void use_kernels(const std::string& name) {
    std::string names;
    for (const KernelTable* kernels : available_kernels()) {
        if (name == kernels->name) {
            chosen().store(kernels, std::memory_order_relaxed);
            return;
        }
        names += (names.empty() ? "" : ", ") + std::string(kernels->name);
    }
    throw std::invalid_argument("isa: this machine runs " + names + ", got '" + name + "'");
}

}  // namespace nextquill
