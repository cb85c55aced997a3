// Dense decoding and the update of summaries on a GPU by themselves: `decode_check [check] [time]`.
//   nvcc -t 8 -std=c++17 -O2 -arch=sm_90 -Icsrc/include -Icsrc --extended-lambda
//       --expt-relaxed-constexpr bench/cpp/decode_check/*.cu csrc/kernels/decode/dense/*.cu
//       csrc/kernels/decode/common/*.cu -o decode_check && ./decode_check
#include <cstring>

#include "support.h"

int main(int argc, char** argv) {
    using namespace condensate;
    const kernels::LaunchContext context = bench::make_context();
    auto wanted = [&](const char* what) { return argc < 2 || std::strcmp(argv[1], what) == 0; };
    const int failures = wanted("check") ? bench::check_all(context) : 0;
    if (wanted("time")) bench::time_all(context);
    return failures ? 1 : 0;
}
