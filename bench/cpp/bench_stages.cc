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

using Stage = Status (StageData::*)() const;

// The stages before `stage` fill what it reads.
Status prepare(const StageData& data) {
    Status status;
    if (data.shape().selector == Selector::kExact) {
        status = data.run_select_tokens();
        return status.ok() ? data.run_attend_tokens() : status;
    }
    status = data.run_block_summaries();
    if (status.ok()) status = data.run_select_blocks();
    if (status.ok()) status = data.run_attend_lists();
    return status;
}

void time_on_cpu(benchmark::State& state, const StageData& data, Stage stage) {
    for (auto _ : state) {
        Status status = (data.*stage)();
        if (!status.ok()) return state.SkipWithError(status.message);
    }
}

#if defined(CONDENSATE_WITH_CUDA)
void time_on_cuda(benchmark::State& state, const StageData& data, Stage stage) {
    cudaEvent_t start, end;
    cudaEventCreate(&start);
    cudaEventCreate(&end);
    for (auto _ : state) {
        cudaEventRecord(start);
        Status status = (data.*stage)();
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

void run(benchmark::State& state, const Shape& shape, const Executor& executor, Stage stage) {
    StageData data(shape, executor, /*seed=*/1);
    Status status = prepare(data);
    if (!status.ok()) return state.SkipWithError(status.message);
#if defined(CONDENSATE_WITH_CUDA)
    if (executor.cuda) return time_on_cuda(state, data, stage);
#endif
    time_on_cpu(state, data, stage);
}

struct Named {
    const char* name;
    Stage stage;
    Selector selector;
};
constexpr Named kStages[] = {
    {"block_summaries", &StageData::run_block_summaries, Selector::kBlock},
    {"select_blocks", &StageData::run_select_blocks, Selector::kBlock},
    {"attention_lists", &StageData::run_attend_lists, Selector::kBlock},
    {"select_tokens", &StageData::run_select_tokens, Selector::kExact},
    {"attention_tokens", &StageData::run_attend_tokens, Selector::kExact},
    {"omitted_mass", &StageData::run_omitted_mass, Selector::kBlock},
    {"merge_states", &StageData::run_merge_states, Selector::kBlock},
};

benchmark::internal::Benchmark* add(const Named& named, Shape shape, const Executor& executor) {
    shape.selector = named.selector;
    std::string name = std::string(executor.cuda ? "cuda/" : "cpu/") + named.name + "/" +
                       std::to_string(shape.kv_len);
    return benchmark::RegisterBenchmark(
               name.c_str(),
               [=](benchmark::State& state) { run(state, shape, executor, named.stage); })
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
            bool quadratic =
                named.selector == Selector::kExact || named.stage == &StageData::run_omitted_mass;
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
