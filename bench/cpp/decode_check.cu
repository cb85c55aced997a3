// Dense decoding and the update of summaries on a GPU by themselves: random inputs against float64
// on the host, hostile tables and lengths, and times by CUDA graph replay.
//   nvcc -t 8 -std=c++17 -O2 -arch=sm_90 -Icsrc/include -Icsrc --extended-lambda
//       --expt-relaxed-constexpr bench/cpp/decode_check.cu csrc/kernels/decode/dense/*.cu
//       csrc/kernels/decode/common/update_summaries.cu -o decode_check && ./decode_check
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "condensate/decode.h"
#include "kernels/launchers.h"

namespace condensate {
namespace {

void check(cudaError_t error, int line) {
    if (error == cudaSuccess) return;
    std::printf("line %d: %s\n", line, cudaGetErrorString(error));
    std::exit(1);
}
#define CHECK(call) check((call), __LINE__)

uint32_t g_state = 1;
float uniform() {  // in [-1, 1)
    g_state = g_state * 1664525u + 1013904223u;
    return static_cast<int32_t>(g_state) / 2147483648.0f;
}
float normal() { return 1.2f * (uniform() + uniform() + uniform()); }

int bytes_of(DType t) { return t == DType::kFloat32 ? 4 : t == DType::kFloat8E4M3 ? 1 : 2; }
void put(DType t, void* data, int64_t i, float x) {
    if (t == DType::kFloat16) static_cast<__half*>(data)[i] = __float2half(x);
    if (t == DType::kBFloat16) static_cast<__nv_bfloat16*>(data)[i] = __float2bfloat16(x);
    if (t == DType::kFloat8E4M3) static_cast<__nv_fp8_e4m3*>(data)[i] = __nv_fp8_e4m3(x);
}
float get(DType t, const void* data, int64_t i) {
    if (t == DType::kFloat16) return __half2float(static_cast<const __half*>(data)[i]);
    if (t == DType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(data)[i]);
    return static_cast<float>(static_cast<const __nv_fp8_e4m3*>(data)[i]);
}

// Device memory with a host copy.
struct Buffer {
    std::vector<char> host;
    char* device = nullptr;
    explicit Buffer(int64_t bytes) : host(bytes) { CHECK(cudaMalloc(&device, bytes + 16)); }
    ~Buffer() { cudaFree(device); }
    Buffer(const Buffer&) = delete;
    void up() { CHECK(cudaMemcpy(device, host.data(), host.size(), cudaMemcpyHostToDevice)); }
    void down() { CHECK(cudaMemcpy(host.data(), device, host.size(), cudaMemcpyDeviceToHost)); }
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(host.data());
    }
};

struct Case {
    const char* name;
    DType dtype, cache;
    int dim, heads, kv_heads, query_len;
    int page;  // 0: contiguous
    bool nhd;
    std::vector<int> lengths;
    float softcap = 0.0f;
    bool sinks = false, hostile = false;
    float scale_sign = 1.0f;
};

constexpr DType kF16 = DType::kFloat16, kBF16 = DType::kBFloat16, kF8 = DType::kFloat8E4M3;

kernels::LaunchContext make_context() {
    kernels::LaunchContext context;
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    context.sm_count = prop.multiProcessorCount;
    context.sm_major = prop.major;
    context.max_smem_per_block_bytes = static_cast<int>(prop.sharedMemPerBlockOptin);
    CHECK(cudaMalloc(&context.error_word, 4));
    CHECK(cudaMemset(context.error_word, 0, 4));
    CHECK(cudaStreamCreate(&context.stream));
    return context;
}
uint32_t take_errors(const kernels::LaunchContext& context) {
    uint32_t word = 0;
    CHECK(cudaStreamSynchronize(context.stream));
    CHECK(cudaMemcpy(&word, context.error_word, 4, cudaMemcpyDeviceToHost));
    CHECK(cudaMemset(context.error_word, 0, 4));
    return word;
}
bool expect_ok(const Status& status) {
    if (!status.ok()) std::printf("  %s\n", status.message);
    return status.ok();
}

// A cache with NaN wherever no sequence has a key, pages in random order.
struct World {
    const Case& c;
    int64_t batch, capacity, page_size, max_pages, pages;
    Buffer key, value, table, lengths, key_scale, value_scale, query, out, lse, sinks, workspace;
    DecodeParams params;

    static int64_t longest(const Case& c) {
        return *std::max_element(c.lengths.begin(), c.lengths.end());
    }
    explicit World(const Case& c_)
        : c(c_),
          batch(static_cast<int64_t>(c.lengths.size())),
          capacity(c.page ? (longest(c) + 3 * c.page) / c.page * c.page : longest(c) + 5),
          page_size(c.page ? c.page : capacity),
          max_pages(capacity / page_size),
          pages(c.page ? batch * max_pages + 3 : batch),
          key(cache_elems() * bytes_of(c.cache)),
          value(cache_elems() * bytes_of(c.cache)),
          table(4 * batch * max_pages),
          lengths(4 * batch),
          key_scale(4 * c.kv_heads),
          value_scale(4 * c.kv_heads),
          query(2 * batch * c.heads * c.query_len * c.dim),
          out(2 * batch * c.heads * c.query_len * c.dim),
          lse(4 * batch * c.heads * c.query_len),
          sinks(4 * c.heads),
          workspace(std::max<int64_t>(workspace_bytes(), 1)) {
        fill();
        params = make(0, batch);
    }
    int64_t cache_elems() const { return pages * c.kv_heads * page_size * c.dim; }
    int64_t workspace_bytes() {
        DecodeParams p = make(0, batch);
        return kernels::decode_dense_workspace_bytes(p, {});
    }
    int64_t offset(int64_t page, int64_t head, int64_t slot) const {
        return c.nhd ? ((page * page_size + slot) * c.kv_heads + head) * c.dim
                     : ((page * c.kv_heads + head) * page_size + slot) * c.dim;
    }
    void fill() {
        for (int64_t i = 0; i < cache_elems(); ++i) {
            put(c.cache, key.as<char>(), i, NAN);
            put(c.cache, value.as<char>(), i, NAN);
        }
        std::vector<int> order(pages);
        for (int64_t i = 0; i < pages; ++i) order[i] = static_cast<int>(i);
        for (int64_t i = pages - 1; i > 0; --i)
            std::swap(order[i], order[(g_state = g_state * 1664525u + 7u) % (i + 1)]);
        for (int64_t b = 0; b < batch; ++b) {
            lengths.as<int32_t>()[b] = c.lengths[b];
            for (int64_t i = 0; i < max_pages; ++i)
                table.as<int32_t>()[b * max_pages + i] = order[b * max_pages + i];
            for (int64_t j = 0; j < (c.hostile ? capacity : c.lengths[b]); ++j)
                for (int64_t h = 0; h < c.kv_heads; ++h)
                    for (int d = 0; d < c.dim; ++d) {
                        const int64_t page =
                            c.page ? table.as<int32_t>()[b * max_pages + j / page_size] : b;
                        const int64_t at = offset(page, h, j % page_size) + d;
                        put(c.cache, key.as<char>(), at, normal());
                        put(c.cache, value.as<char>(), at, normal());
                    }
        }
        if (c.hostile) {
            const int bad[] = {-1, INT32_MIN, INT32_MAX, static_cast<int>(pages)};
            for (int i = 0; i < 4; ++i)
                table.as<int32_t>()[i * max_pages + 2 * i % max_pages] = bad[i];
            lengths.as<int32_t>()[4] = -5;
            lengths.as<int32_t>()[5] = INT32_MAX;
        }
        for (int64_t i = 0; i < batch * c.heads * c.query_len * c.dim; ++i)
            put(c.dtype, query.as<char>(), i, normal());
        for (int h = 0; h < c.kv_heads; ++h) {
            key_scale.as<float>()[h] = 0.5f + 0.25f * h;
            value_scale.as<float>()[h] = 1.5f - 0.1f * h;
        }
        for (int h = 0; h < c.heads; ++h) sinks.as<float>()[h] = normal();
        for (Buffer* b : {&key, &value, &table, &lengths, &key_scale, &value_scale, &query, &sinks})
            b->up();
    }
    // Of sequences [first, first + count).
    DecodeParams make(int64_t first, int64_t count) {
        DecodeParams p;
        p.mode = DecodeMode::kDense;
        p.dtype = c.dtype;
        p.batch = count;
        p.query_heads = c.heads;
        p.kv_heads = c.kv_heads;
        p.query_len = c.query_len;
        p.head_dim = c.dim;
        p.scale = c.scale_sign / std::sqrt(static_cast<float>(c.dim));
        p.softcap = c.softcap;
        p.sinks = c.sinks ? reinterpret_cast<float*>(sinks.device) : nullptr;
        const int64_t rows = first * c.heads * c.query_len;
        p.query = {query.device + 2 * rows * c.dim, int64_t{c.heads} * c.query_len * c.dim,
                   int64_t{c.query_len} * c.dim, c.dim};
        p.out = out.device + 2 * rows * c.dim;
        p.out_stride_batch = p.query.stride_batch;
        p.out_stride_head = p.query.stride_head;
        p.out_stride_seq = p.query.stride_seq;
        p.lse = reinterpret_cast<float*>(lse.device) + rows;
        p.workspace = workspace.device;
        KvCache& k = p.cache;
        k.dtype = c.cache;
        k.key = key.device;
        k.value = value.device;
        k.key_stride_page = k.value_stride_page = page_size * c.kv_heads * c.dim;
        k.key_stride_head = k.value_stride_head = c.nhd ? c.dim : page_size * c.dim;
        k.key_stride_token = k.value_stride_token = c.nhd ? int64_t{c.kv_heads} * c.dim : c.dim;
        k.num_pages = pages;
        k.page_size = page_size;
        k.max_pages = max_pages;
        if (c.page) {
            k.block_table = reinterpret_cast<int32_t*>(table.device) + first * max_pages;
        } else {
            k.key = key.device + first * k.key_stride_page * bytes_of(c.cache);
            k.value = value.device + first * k.key_stride_page * bytes_of(c.cache);
            k.num_pages = count;
        }
        k.lengths = reinterpret_cast<int32_t*>(lengths.device) + first;
        if (c.cache == kF8) {
            k.key_scale = reinterpret_cast<float*>(key_scale.device);
            k.value_scale = reinterpret_cast<float*>(value_scale.device);
        }
        return p;
    }
    int64_t bounded(int64_t b) {
        return std::min<int64_t>(std::max(lengths.as<int32_t>()[b], 0), capacity);
    }
};

// Largest error of outputs in units of the tolerance, and of LSE absolutely.
void compare(World& w, double* worst, double* worst_lse) {
    const Case& c = w.c;
    const int group = c.heads / c.kv_heads;
    const double u = c.dtype == kF16 ? 1.0 / 2048 : 1.0 / 256;
    for (int64_t b = 0; b < w.batch; ++b)
        for (int h = 0; h < c.heads; ++h)
            for (int i = 0; i < c.query_len; ++i) {
                const int64_t row = (b * c.heads + h) * c.query_len + i;
                const int64_t p = w.bounded(b) - c.query_len + i;
                const int kv = h / group;
                const double ks = c.cache == kF8 ? w.key_scale.as<float>()[kv] : 1.0;
                const double vs = c.cache == kF8 ? w.value_scale.as<float>()[kv] : 1.0;
                std::vector<double> scores;
                std::vector<int64_t> at;
                double most = -INFINITY, total = 0.0;
                for (int64_t j = 0; j <= p; ++j) {
                    const int64_t page =
                        c.page ? w.table.as<int32_t>()[b * w.max_pages + j / w.page_size] : b;
                    if (page < 0 || page >= w.pages) continue;
                    const int64_t o = w.offset(page, kv, j % w.page_size);
                    double s = 0.0;
                    for (int d = 0; d < c.dim; ++d)
                        s += double{get(c.dtype, w.query.as<char>(), row * c.dim + d)} *
                             get(c.cache, w.key.as<char>(), o + d);
                    s *= w.params.scale * ks;
                    if (c.softcap > 0) s = c.softcap * std::tanh(s / c.softcap);
                    scores.push_back(s);
                    at.push_back(o);
                    most = std::max(most, s);
                }
                if (c.sinks && p >= 0) most = std::max(most, double{w.sinks.as<float>()[h]});
                for (double s : scores) total += std::exp(s - most);
                if (c.sinks && p >= 0) total += std::exp(w.sinks.as<float>()[h] - most);
                for (int d = 0; d < c.dim; ++d) {
                    double o = 0.0, a = 0.0;
                    for (size_t n = 0; n < at.size(); ++n) {
                        const double v = get(c.cache, w.value.as<char>(), at[n] + d) * vs;
                        o += std::exp(scores[n] - most) / total * v;
                        a += std::exp(scores[n] - most) / total * std::fabs(v);
                    }
                    const double got = get(c.dtype, w.out.as<char>(), row * c.dim + d);
                    const double error =
                        std::fabs(got - o) / (u * (a + std::fabs(o)) + 2e-5 * a + 1e-30);
                    *worst = std::max(*worst, std::isnan(got) ? INFINITY : error);
                }
                const double lse = total > 0 ? most + std::log(total) : -INFINITY;
                const double got = w.lse.as<float>()[row];
                const double d = lse == got ? 0.0 : std::fabs(lse - got);
                *worst_lse = std::max(*worst_lse, std::isnan(got) ? INFINITY : d);
            }
}

int g_failures = 0;

void run_case(const Case& c, const kernels::LaunchContext& context) {
    World w(c);
    CHECK(cudaMemset(w.out.device, 0xff, w.out.host.size()));
    CHECK(cudaMemset(w.workspace.device, 0xff, w.workspace.host.size()));
    bool ok = expect_ok(kernels::decode_dense(w.params, context));
    const uint32_t errors = take_errors(context);
    w.out.down();
    w.lse.down();
    double worst = 0.0, worst_lse = 0.0;
    compare(w, &worst, &worst_lse);
    // Every sequence alone: the same bits.
    const std::vector<char> out = w.out.host, lse = w.lse.host;
    for (int64_t b = 0; b < w.batch; ++b)
        ok &= expect_ok(kernels::decode_dense(w.make(b, 1), context));
    take_errors(context);
    w.out.down();
    w.lse.down();
    const bool same = out == w.out.host && lse == w.lse.host;
    const uint32_t expected = c.hostile ? kErrorBlockTable | kErrorCacheLength : 0u;
    ok &= worst <= 1.0 && worst_lse <= 2e-4 && same && errors == expected;
    g_failures += !ok;
    std::printf("%-34s error/tolerance %.3f  lse %.1e  alone %s  errors %u  %s\n", c.name, worst,
                worst_lse, same ? "same" : "DIFFERS", errors, ok ? "ok" : "FAILED");
}

// The summaries against the same float32 operations on the host: equal bits.
void run_update(const Case& c, int64_t appended, const kernels::LaunchContext& context) {
    World w(c);
    const int64_t rows = record_rows(w.page_size, c.page > 0), units = unit_rows(w.page_size);
    const int pool = pool_keys(w.page_size, c.page > 0);
    Buffer entries(w.pages * c.kv_heads * rows * c.dim), scales(4 * w.pages * c.kv_heads * rows),
        center(4 * c.kv_heads * c.dim);
    for (int64_t i = 0; i < c.kv_heads * c.dim; ++i) center.as<float>()[i] = 0.3f * normal();
    std::fill(entries.host.begin(), entries.host.end(), char{77});
    std::fill(scales.as<float>(), scales.as<float>() + w.pages * c.kv_heads * rows, 5.0f);
    center.up();
    entries.up();
    scales.up();
    UpdateSummariesParams p;
    p.batch = w.batch;
    p.kv_heads = c.kv_heads;
    p.head_dim = c.dim;
    p.appended = appended;
    p.cache = w.params.cache;
    p.summaries.rows = reinterpret_cast<int8_t*>(entries.device);
    p.summaries.scales = reinterpret_cast<float*>(scales.device);
    p.summaries.rows_stride_head = rows * c.dim;
    p.summaries.rows_stride_page = c.kv_heads * rows * c.dim;
    p.summaries.scales_stride_head = rows;
    p.summaries.scales_stride_page = c.kv_heads * rows;
    p.summaries.key_center = reinterpret_cast<float*>(center.device);
    bool ok = expect_ok(kernels::update_summaries(p, context));
    const uint32_t errors = take_errors(context);

    auto make_row = [&](bool values, int64_t page, int64_t head, int64_t begin, int64_t end,
                        int64_t row) {
        const float s =
            c.cache != kF8 ? 1.0f : (values ? w.value_scale : w.key_scale).as<float>()[head];
        std::vector<float> x(c.dim);
        float m = 0.0f;
        volatile float t;
        for (int d = 0; d < c.dim; ++d) {
            volatile float sum = 0.0f;
            for (int64_t slot = begin; slot < end; ++slot) {
                t = get(c.cache, (values ? w.value : w.key).as<char>(),
                        w.offset(page, head, slot) + d) *
                    s;
                sum = sum + t;
            }
            t = sum / static_cast<float>(end - begin);
            if (!values) t = t - center.as<float>()[head * c.dim + d];
            x[d] = t;
            m = std::max<float>(m, std::fabs(x[d]));
        }
        const int64_t flat = (page * c.kv_heads + head) * rows + row;
        volatile float inverse = 127.0f / m;
        for (int d = 0; d < c.dim; ++d) {
            t = x[d] * inverse;
            entries.as<int8_t>()[flat * c.dim + d] = static_cast<int8_t>(std::nearbyint(t));
        }
        scales.as<float>()[flat] = m / 127.0f;
    };
    for (int64_t b = 0; b < w.batch; ++b) {
        const int64_t n = w.bounded(b), from = std::max<int64_t>(n - appended, 0);
        for (int64_t j = from; j < n; ++j) {
            const int64_t page =
                c.page ? w.table.as<int32_t>()[b * w.max_pages + j / w.page_size] : b;
            if (page < 0 || page >= w.pages) continue;
            const int64_t slot = j % w.page_size, left = n - j + slot,
                          in_page = std::min(left, w.page_size);
            const int64_t unit = slot / kUnitKeys, pl = slot / pool;
            for (int64_t h = 0; h < c.kv_heads; ++h) {
                if (j == from || slot % kUnitKeys == 0)
                    make_row(false, page, h, unit * kUnitKeys,
                             std::min<int64_t>(in_page, unit * kUnitKeys + kUnitKeys), unit);
                if (j == from || slot % pool == 0)
                    make_row(true, page, h, pl * pool, std::min<int64_t>(in_page, pl * pool + pool),
                             units + pl);
            }
        }
    }
    const std::vector<char> want = entries.host, want_scales = scales.host;
    entries.down();
    scales.down();
    const bool same = want == entries.host && want_scales == scales.host;
    const uint32_t expected = c.hostile ? kErrorCacheLength : 0u;
    ok &= same && (errors & ~kErrorBlockTable) == expected;
    g_failures += !ok;
    std::printf("update %5lld of %-24s bits %s  errors %u  %s\n", static_cast<long long>(appended),
                c.name, same ? "equal" : "DIFFER", errors, ok ? "ok" : "FAILED");
}

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
    CHECK(cudaMalloc(&workspace, kernels::decode_dense_workspace_bytes(p, context) + 16));
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
        return kernels::decode_dense(p, context);
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

const Case kCases[] = {
    {"bf16 d128 contiguous", kBF16, kBF16, 128, 8, 2, 1, 0, false, {1, 17, 300, 0, 1000}},
    {"bf16 d128 pages of 16 NHD", kBF16, kBF16, 128, 8, 2, 3, 16, true, {2, 700, 33, 129, 5}},
    {"f16 d64 pages of 64", kF16, kF16, 64, 4, 4, 1, 64, false, {64, 65, 63, 900}},
    {"bf16 d96 pages of 32", kBF16, kBF16, 96, 6, 2, 5, 32, false, {1, 31, 500, 257}},
    {"f16 d256 pages of 128", kF16, kF16, 256, 4, 2, 2, 128, true, {300, 128, 1}},
    {"bf16 d256 group 16, 16 queries", kBF16, kBF16, 256, 16, 1, 16, 16, false, {400, 7}},
    {"bf16 d128 8 queries", kBF16, kBF16, 128, 32, 8, 8, 16, false, {4, 300, 17, 1500}},
    {"bf16 d128 group 16, 16 queries", kBF16, kBF16, 128, 32, 2, 16, 32, false, {9, 450}},
    {"f16 long: splits of more", kF16, kF16, 64, 2, 1, 1, 64, false, {20000, 16385}},
    {"e4m3 d128, bf16 queries", kBF16, kF8, 128, 8, 2, 1, 16, false, {1, 300, 1000}},
    {"e4m3 d128, f16, 8 queries", kF16, kF8, 128, 16, 4, 8, 64, true, {40, 300}},
    {"e4m3 d64", kBF16, kF8, 64, 8, 2, 2, 16, false, {1, 500}},
    {"e4m3 d96", kF16, kF8, 96, 8, 2, 6, 32, false, {3, 500}},
    {"e4m3 d256", kBF16, kF8, 256, 8, 2, 2, 16, true, {50, 260}},
    {"softcap and sinks", kBF16, kBF16, 128, 8, 2, 2, 16, false, {1, 200, 900}, 5.0f, true},
    {"negative scale", kF16, kF16, 64, 8, 2, 2, 16, false, {1, 200}, 0.0f, false, false, -1.0f},
    {"hostile",
     kBF16,
     kBF16,
     128,
     8,
     2,
     2,
     16,
     false,
     {200, 200, 200, 200, 200, 200, 200},
     0.0f,
     false,
     true},
};

int main_() {
    const kernels::LaunchContext context = make_context();
    for (const Case& c : kCases) run_case(c, context);
    for (int64_t appended : {1, 9, 100, 100000})
        for (int i : {0, 1, 2, 3, 4, 9, 12, 13, 16})
            if (!kCases[i].hostile || appended > 100) run_update(kCases[i], appended, context);
    std::printf("%d failures\n\n", g_failures);
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
    return g_failures ? 1 : 0;
}

}  // namespace
}  // namespace condensate

int main() { return condensate::main_(); }
