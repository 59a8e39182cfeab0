// See cpu/build_info.cpp.
#pragma once

#include <string>
#include <vector>

namespace vmae2 {

// Instruction sets of the running processor that kernels may choose by, detected at run time.
std::vector<std::string> cpu_features();

// Whether kernels run on several threads: the compiler had OpenMP.
bool openmp();

// Name and version of the compiler that built the extension.
std::string compiler();

}  // namespace vmae2
