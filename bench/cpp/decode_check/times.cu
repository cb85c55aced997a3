// Times of dense decoding and of the update of summaries by replays of CUDA graphs, over caches
// that together exceed L2.
#include "support.h"

namespace condensate::bench {
namespace {

// Microseconds of one call of body(i), by replays of a graph over i in [0, calls).
template <class Body>
double graph_us(const kernels::LaunchContext& context, int calls, Body&& body) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamBeginCapture(context.stream, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < calls; ++i)
        if (!expect_ok(body(i))) std::exit(1);
    CHECK(cudaStreamEndCapture(context.stream, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    cudaEvent_t begin, end;
    CHECK(cudaEventCreate(&begin));
    CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int round = 0; round < 15; ++round) {
        CHECK(cudaEventRecord(begin, context.stream));
        CHECK(cudaGraphLaunch(exec, context.stream));
        CHECK(cudaEventRecord(end, context.stream));
        CHECK(cudaEventSynchronize(end));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (round >= 5) times.push_back(ms);
    }
    CHECK(cudaGraphExecDestroy(exec));
    CHECK(cudaGraphDestroy(graph));
    std::sort(times.begin(), times.end());
    return times[times.size() / 2] * 1e3 / calls;
}

double copy_bytes_per_us(const kernels::LaunchContext& context) {
    const int64_t bytes = int64_t{1} << 30;
    char* data;
    CHECK(cudaMalloc(&data, 2 * bytes));
    const double us = graph_us(context, 4, [&](int) {
        CHECK(cudaMemcpyAsync(data + bytes, data, bytes, cudaMemcpyDeviceToDevice, context.stream));
        return Status{};
    });
    CHECK(cudaFree(data));
    return 2.0 * bytes / us;
}

struct Timing {
    int batch, length, query_len, page;
    DType cache = kBF16;
    int dim = 128, heads = 32, kv_heads = 8;
};

__global__ void fill_kernel(uint16_t* data, int64_t n) {
    for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n;
         i += int64_t{gridDim.x} * blockDim.x) {
        const uint32_t x = (static_cast<uint32_t>(i) * 2654435761u) >> 16;
        data[i] = static_cast<uint16_t>((x & 0x807f) | 0x3f00);  // bfloat16 of size 0.5 to 1
    }
}

void time_case(const Timing& t, double copy, const kernels::LaunchContext& context) {
    const int64_t page = t.page ? t.page : t.length, max_pages = t.length / page;
    const int64_t elems = int64_t{t.batch} * t.length * t.kv_heads * t.dim,
                  bytes = elems * bytes_of(t.cache);
    const int sets = static_cast<int>(std::max<int64_t>(1, (int64_t{1} << 28) / (2 * bytes)));
    char* cache;
    CHECK(cudaMalloc(&cache, 2 * bytes * sets));
    fill_kernel<<<1024, 256>>>(reinterpret_cast<uint16_t*>(cache), bytes * sets);
    std::vector<int32_t> table(t.batch * max_pages), lengths(t.batch, t.length);
    for (size_t i = 0; i < table.size(); ++i)
        table[i] = static_cast<int32_t>((i * 7919) % table.size());
    int32_t *table_device, *lengths_device;
    CHECK(cudaMalloc(&table_device, 4 * table.size()));
    CHECK(cudaMalloc(&lengths_device, 4 * lengths.size()));
    CHECK(cudaMemcpy(table_device, table.data(), 4 * table.size(), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(lengths_device, lengths.data(), 4 * lengths.size(), cudaMemcpyHostToDevice));
    const int64_t q_elems = int64_t{t.batch} * t.heads * t.query_len * t.dim;
    char* q;
    CHECK(cudaMalloc(&q, 4 * q_elems));
    fill_kernel<<<64, 256>>>(reinterpret_cast<uint16_t*>(q), q_elems);
    DecodeParams p;
    p.mode = DecodeMode::kDense;
    p.batch = t.batch;
    p.query_heads = t.heads;
    p.kv_heads = t.kv_heads;
    p.query_len = t.query_len;
    p.head_dim = t.dim;
    p.scale = 1.0f / std::sqrt(static_cast<float>(t.dim));
    p.query = {q, int64_t{t.heads} * t.query_len * t.dim, int64_t{t.query_len} * t.dim, t.dim};
    p.out = q + 2 * q_elems;
    p.out_stride_batch = p.query.stride_batch;
    p.out_stride_head = p.query.stride_head;
    p.out_stride_seq = p.query.stride_seq;
    KvCache& k = p.cache;
    k.dtype = t.cache;
    k.key_stride_page = k.value_stride_page = page * t.kv_heads * t.dim;
    k.key_stride_head = k.value_stride_head = page * t.dim;
    k.key_stride_token = k.value_stride_token = t.dim;
    k.num_pages = t.page ? static_cast<int64_t>(table.size()) : t.batch;
    k.page_size = page;
    k.max_pages = max_pages;
    k.block_table = t.page ? table_device : nullptr;
    k.lengths = lengths_device;
    char* workspace;
    CHECK(cudaMalloc(&workspace, kernels::decode::dense_workspace_bytes(p) + 16));
    p.workspace = workspace;
    const int64_t rows = record_rows(page, t.page > 0), records = k.num_pages * t.kv_heads * rows;
    char* summaries;
    CHECK(cudaMalloc(&summaries, records * (t.dim + 4)));
    UpdateSummariesParams u;
    u.batch = t.batch;
    u.kv_heads = t.kv_heads;
    u.head_dim = t.dim;
    u.summaries.scales = reinterpret_cast<float*>(summaries);
    u.summaries.rows = reinterpret_cast<int8_t*>(summaries + 4 * records);
    u.summaries.rows_stride_head = rows * t.dim;
    u.summaries.rows_stride_page = t.kv_heads * rows * t.dim;
    u.summaries.scales_stride_head = rows;
    u.summaries.scales_stride_page = t.kv_heads * rows;
    auto use_set = [&](int i, KvCache* of) {
        of->key = cache + 2 * bytes * (i % sets);
        of->value = cache + 2 * bytes * (i % sets) + bytes;
    };
    const int calls = std::max(sets, 8);
    const double us = graph_us(context, calls, [&](int i) {
        use_set(i, &p.cache);
        return kernels::decode::run_dense(p, context);
    });
    u.cache = p.cache;
    auto update_us = [&](int64_t appended) {
        u.appended = appended;
        return graph_us(context, calls, [&](int i) {
            use_set(i, &u.cache);
            return kernels::update_summaries(u, context);
        });
    };
    std::printf(
        "B%-3d %7d keys  Lq %-2d page %-3d %s d%-3d  dense %8.2f us  floor %8.2f (%5.1f %% of copy)"
        "  update 1: %6.2f us  all: %9.2f\n",
        t.batch, t.length, t.query_len, t.page, t.cache == kF8 ? "e4m3" : "bf16", t.dim, us,
        2.0 * bytes / copy, 100.0 * 2.0 * bytes / copy / us, update_us(1), update_us(t.length));
    for (void* x : {static_cast<void*>(cache), static_cast<void*>(table_device),
                    static_cast<void*>(lengths_device), static_cast<void*>(q),
                    static_cast<void*>(workspace), static_cast<void*>(summaries)})
        CHECK(cudaFree(x));
}

}  // namespace

void time_all(const kernels::LaunchContext& context) {
    const double copy = copy_bytes_per_us(context);
    std::printf("copy %.3f TB/s\n", copy / 1e6);
    for (const Timing& t : {Timing{1, 4096, 1, 0},
                            {1, 4096, 1, 16},
                            {1, 32768, 1, 0},
                            {1, 131072, 1, 0},
                            {1, 131072, 1, 16},
                            {1, 131072, 8, 16},
                            {1, 131072, 8, 0},
                            {1, 131072, 16, 16},
                            {1, 1048576, 1, 16},
                            {8, 131072, 1, 16},
                            {16, 32768, 1, 16},
                            {64, 32768, 1, 16},
                            {1, 131072, 1, 16, kF8},
                            {8, 131072, 1, 16, kF8},
                            {1, 131072, 8, 16, kF8},
                            {8, 32768, 1, 16, kBF16, 256},
                            {8, 32768, 1, 16, kBF16, 64},
                            {8, 32768, 1, 16, kBF16, 96}})
        time_case(t, copy, context);
}

}  // namespace condensate::bench
