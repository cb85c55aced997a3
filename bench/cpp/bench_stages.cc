// Time of each stage on the torch-free library. CUDA stages are timed by events on their stream;
// CPU stages run on one thread.
#include <memory>
#include <string>

#include <benchmark/benchmark.h>

#include "stage_data.h"

#if defined(CONDENSATE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace condensate::bench {
namespace {

using Run = Status (*)(const StageData&);

void time_on_cpu(benchmark::State& state, const StageData& data, Run run) {
    for (auto _ : state) {
        Status status = run(data);
        if (!status.ok()) return state.SkipWithError(status.message);
    }
}

#if defined(CONDENSATE_WITH_CUDA)
void time_on_cuda(benchmark::State& state, const StageData& data, Run run) {
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    for (auto _ : state) {
        cudaEventRecord(start);
        Status status = run(data);
        cudaEventRecord(end);
        cudaError_t error = cudaEventSynchronize(end);
        float milliseconds = 0;
        cudaEventElapsedTime(&milliseconds, start, end);
        state.SetIterationTime(milliseconds * 1e-3);
        if (!status.ok()) state.SkipWithError(status.message);
        if (error != cudaSuccess) state.SkipWithError(cudaGetErrorString(error));
    }
    cudaEventDestroy(start);
    cudaEventDestroy(end);
}
#endif

void time_run(benchmark::State& state, const Shape& shape, const Executor& executor, Run run) {
    StageData data(shape, executor, /*seed=*/1);
    Status status = data.prepare();
    if (status.ok()) status = data.run_call();  // fills what the stages read
    if (!status.ok()) return state.SkipWithError(status.message);
#if defined(CONDENSATE_WITH_CUDA)
    if (executor.cuda) return time_on_cuda(state, data, run);
#endif
    time_on_cpu(state, data, run);
}

template <Stage kStage>
Status run_stage(const StageData& data) {
    return data.run_stage(kStage);
}

struct Named {
    const char* name;
    Run run;
    Selector selector;
    bool far_field;
};
constexpr Run kOmittedMass = [](const StageData& data) { return data.run_omitted_mass(); };
constexpr Named kStages[] = {
    {"call", [](const StageData& data) { return data.run_call(); }, Selector::kBlock, true},
    {"block_summaries", run_stage<Stage::kBlockSummaries>, Selector::kBlock, true},
    {"select_blocks", run_stage<Stage::kSelectBlocks>, Selector::kBlock, true},
    {"far_pools", run_stage<Stage::kFarPools>, Selector::kBlock, true},
    {"attention_far", run_stage<Stage::kAttention>, Selector::kBlock, true},
    {"attention_lists", run_stage<Stage::kAttention>, Selector::kBlock, false},
    {"select_tokens", run_stage<Stage::kSelectTokens>, Selector::kExact, false},
    {"attention_tokens", run_stage<Stage::kAttention>, Selector::kExact, false},
    {"omitted_mass", kOmittedMass, Selector::kBlock, false},
    {"merge_states", [](const StageData& data) { return data.run_merge_states(); },
     Selector::kBlock, false},
};

benchmark::internal::Benchmark* add(const Named& named, Shape shape, const Executor& executor) {
    shape.selector = named.selector;
    shape.far_field = named.far_field;
    std::string name = std::string(executor.cuda ? "cuda/" : "cpu/") + named.name + "/" +
                       std::to_string(shape.kv_len);
    return benchmark::RegisterBenchmark(
               name.c_str(),
               [=](benchmark::State& state) { time_run(state, shape, executor, named.run); })
        ->Unit(benchmark::kMillisecond);
}

bool add_all() {
    Shape on_cpu;
    on_cpu.query_heads = 8;
    on_cpu.kv_heads = 2;
    on_cpu.head_dim = 64;
    on_cpu.topk = 192;
    on_cpu.query_len = on_cpu.kv_len = 2048;
    on_cpu.dtype = DType::kFloat32;
    for (const Named& named : kStages) add(named, on_cpu, Executor{});
#if defined(CONDENSATE_WITH_CUDA)
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return false;
    Executor cuda;
    cuda.cuda = true;
    for (int64_t length : {8192, 32768, 131072}) {
        for (const Named& named : kStages) {
            bool quadratic = named.selector == Selector::kExact || named.run == kOmittedMass;
            if (quadratic && length > 32768) continue;
            Shape shape;
            shape.query_len = shape.kv_len = length;
            add(named, shape, cuda)->UseManualTime();
        }
    }
#endif
    return true;
}

const bool kAdded = add_all();

}  // namespace
}  // namespace condensate::bench
