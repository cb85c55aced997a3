// attention() from C++, without torch: plan the call, allocate what the plan asks for, run it.
// Built as the target attention_example; links condensate_core alone. Here on the CPU: for CUDA,
// set executor.cuda, device_index and stream, and pass device memory.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "condensate/condensate.h"

using namespace condensate;

namespace {

constexpr int64_t kQueryHeads = 8, kKvHeads = 2, kLength = 4096, kHeadDim = 64;

// [1, heads, kLength, kHeadDim], contiguous.
ConstTensor4 view(const std::vector<float>& data, int64_t heads) {
    return {data.data(), heads * kLength * kHeadDim, kLength * kHeadDim, kHeadDim};
}

std::vector<float> random_floats(int64_t count, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> data(static_cast<size_t>(count));
    for (float& x : data) x = normal(random);
    return data;
}

int fail(const Status& status) {
    std::fprintf(stderr, "%s\n", status.message);
    return 1;
}

}  // namespace

int main() {
    const int64_t rows = kQueryHeads * kLength;
    const std::vector<float> query = random_floats(rows * kHeadDim, 1);
    const std::vector<float> key = random_floats(kKvHeads * kLength * kHeadDim, 2);
    const std::vector<float> value = random_floats(kKvHeads * kLength * kHeadDim, 3);
    std::vector<float> out(query.size()), omitted(static_cast<size_t>(rows));

    AttentionCall call;
    call.problem.dtype = DType::kFloat32;
    call.problem.batch = 1;
    call.problem.query_heads = kQueryHeads;
    call.problem.kv_heads = kKvHeads;
    call.problem.query_len = call.problem.kv_len = kLength;
    call.problem.head_dim = kHeadDim;
    call.problem.window = 256;
    call.problem.anchors = 64;
    call.problem.scale = 1.0f / std::sqrt(static_cast<float>(kHeadDim));
    call.query = view(query, kQueryHeads);
    call.key = view(key, kKvHeads);
    call.value = view(value, kKvHeads);
    call.selector = Selector::kBlock;
    call.topk = 512;
    call.far_field = true;
    call.out = out.data();
    call.omitted_mass_estimate = omitted.data();

    const Executor executor;  // one thread of this one; see parallel_for
    Plan plan;
    Status status = plan_attention(call, executor, &plan);
    if (!status.ok()) return fail(status);
    std::printf("%s\n", to_string(plan).c_str());

    std::vector<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes));
    status = run_attention(call, plan, workspace.data(), executor);
    if (!status.ok()) return fail(status);

    double condensed = 0;
    for (float share : omitted) condensed += share;
    std::printf("condensed instead of attended: %.1f %% of the softmax\n",
                100 * condensed / static_cast<double>(rows));
    const bool sane = std::isfinite(out.back()) && condensed > 0 && condensed < rows;
    return sane ? 0 : 1;
}
