#include "stage_data.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/number.h"

#if defined(CONDENSATE_WITH_CUDA)
#include <cuda_runtime_api.h>
#endif

namespace condensate::bench {
namespace {

[[noreturn]] void die(const char* what) {
    std::fprintf(stderr, "bench: %s\n", what);
    std::abort();
}

#if defined(CONDENSATE_WITH_CUDA)
void check(cudaError_t error) {
    if (error != cudaSuccess) die(cudaGetErrorString(error));
}
void* allocate_cuda(int64_t bytes) {
    void* data = nullptr;
    check(cudaMalloc(&data, static_cast<size_t>(bytes)));
    return data;
}
void copy(void* target, const void* source, int64_t bytes, bool cuda) {
    if (cuda)
        check(cudaMemcpy(target, source, static_cast<size_t>(bytes), cudaMemcpyDefault));
    else
        std::memcpy(target, source, static_cast<size_t>(bytes));
}
void free_cuda(void* data) { cudaFree(data); }
#else
void* allocate_cuda(int64_t) { die("this build has no CUDA kernels"); }
void copy(void* target, const void* source, int64_t bytes, bool) {
    std::memcpy(target, source, static_cast<size_t>(bytes));
}
void free_cuda(void*) {}
#endif

// Elements that are drawn; a longer tensor repeats them. A prime, so that rows never line up.
constexpr int64_t kPatternElems = 1048573;

uint64_t next_random(uint64_t* state) {  // splitmix64
    uint64_t z = (*state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
}

// The sum of four uniform 16-bit numbers, scaled to variance 1.
float nearly_normal(uint64_t* state) {
    uint64_t bits = next_random(state);
    int64_t sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<int64_t>((bits >> (16 * i)) & 0xffff) - 32768;
    return static_cast<float>(sum) / 37837.0f;
}

}  // namespace

void Buffer::allocate(const Executor& executor, int64_t bytes) {
    cuda_ = executor.cuda;
    bytes_ = bytes;
    if (bytes == 0) return;
    data_ = cuda_ ? allocate_cuda(bytes) : std::malloc(static_cast<size_t>(bytes));
    if (data_ == nullptr) die("out of memory");
}

Buffer::~Buffer() {
    if (cuda_)
        free_cuda(data_);
    else
        std::free(data_);
}

void Buffer::write(const void* source, int64_t offset_bytes, int64_t count_bytes) {
    copy(as<uint8_t>() + offset_bytes, source, count_bytes, cuda_);
}

void Buffer::fill(uint8_t byte) {
    std::vector<uint8_t> pattern(static_cast<size_t>(bytes_), byte);
    if (bytes_ > 0) write(pattern.data(), 0, bytes_);
}

void Buffer::fill_random(DType dtype, uint64_t seed) {
    int64_t elems = std::min(bytes_ / dtype_bytes(dtype), kPatternElems);
    std::vector<uint8_t> pattern(static_cast<size_t>(elems * dtype_bytes(dtype)));
    for (int64_t i = 0; i < elems; ++i)
        store_number(dtype, pattern.data(), i, nearly_normal(&seed));
    int64_t step = static_cast<int64_t>(pattern.size());
    for (int64_t offset = 0; offset < bytes_; offset += step)
        write(pattern.data(), offset, std::min(step, bytes_ - offset));
}

std::vector<uint8_t> Buffer::read() const {
    std::vector<uint8_t> host(static_cast<size_t>(bytes_));
    if (bytes_ > 0) copy(host.data(), data_, bytes_, cuda_);
    return host;
}

StageData::StageData(const Shape& s, const Executor& executor, uint64_t seed)
    : shape_(s), executor_(executor) {
    int group = static_cast<int>(s.query_heads / s.kv_heads);
    int64_t elem_bytes = dtype_bytes(s.dtype);
    bool blocks = s.selector != Selector::kExact;
    rows_ = s.batch * s.query_heads * s.query_len;
    lists_ = s.batch * s.kv_heads * num_tiles(s.query_len, group);
    list_width_ = blocks ? s.topk / kBlockKeys : 0;

    for (Buffer* rows_by_dim : {&query, &out, &merged_out})
        rows_by_dim->allocate(executor, rows_ * s.head_dim * elem_bytes);
    for (Buffer* keys : {&key, &value})
        keys->allocate(executor, s.batch * s.kv_heads * s.kv_len * s.head_dim * elem_bytes);
    for (Buffer* a_row :
         {&estimate, &threshold, &tie_index, &lse_full, &lse, &omitted, &merged_lse})
        a_row->allocate(executor, rows_ * 4);
    if (blocks) {
        int64_t rows = s.batch * s.kv_heads * summary_rows(s.selector, s.kv_len);
        int row_dim = summary_dim(s.selector, static_cast<int>(s.head_dim));
        summaries.allocate(executor, rows * row_dim * elem_bytes);
        block_indices.allocate(executor, lists_ * list_width_ * 4);
        block_counts.allocate(executor, lists_ * 4);
        workspace.allocate(executor, block_select_workspace_bytes(select_params(), executor));
        const int64_t dims = s.batch * s.kv_heads * s.head_dim;
        for (Buffer* means : {&key_means, &value_means})
            means->allocate(executor, dims * num_blocks(s.kv_len) * elem_bytes);
        far_sums.allocate(executor, 2 * dims * num_far_sums(s.kv_len) * 4);
        far_means.allocate(executor, 2 * dims * num_far_pools(s.kv_len) * elem_bytes);
    }
    query.fill_random(s.dtype, seed);
    key.fill_random(s.dtype, seed + 1);
    value.fill_random(s.dtype, seed + 2);
}

Problem StageData::problem() const {
    Problem p;
    p.dtype = shape_.dtype;
    p.batch = shape_.batch;
    p.query_heads = shape_.query_heads;
    p.kv_heads = shape_.kv_heads;
    p.query_len = shape_.query_len;
    p.kv_len = shape_.kv_len;
    p.head_dim = shape_.head_dim;
    p.window = shape_.window;
    p.anchors = shape_.anchors;
    p.causal = shape_.causal;
    p.scale = 1.0f / std::sqrt(static_cast<float>(shape_.head_dim));
    return p;
}

ConstTensor4 StageData::query_view() const {
    int64_t head = shape_.query_len * shape_.head_dim;
    return {query.as<void>(), shape_.query_heads * head, head, shape_.head_dim};
}

ConstTensor4 StageData::keys_view(const Buffer& keys) const {
    int64_t head = shape_.kv_len * shape_.head_dim;
    return {keys.as<void>(), shape_.kv_heads * head, head, shape_.head_dim};
}

BlockSelectParams StageData::select_params() const {
    BlockSelectParams p;
    p.problem = problem();
    p.selector = shape_.selector;
    p.query = query_view();
    p.summaries = summaries.as<void>();
    p.key = keys_view(key);
    p.max_blocks = list_width_;
    p.block_indices = block_indices.as<int32_t>();
    p.block_counts = block_counts.as<int32_t>();
    p.omitted_mass_estimate = estimate.as<float>();
    p.workspace = workspace.as<void>();
    return p;
}

AttentionParams StageData::attention_params() const {
    AttentionParams p;
    p.problem = problem();
    p.query = query_view();
    p.key = keys_view(key);
    p.value = keys_view(value);
    p.out = out.as<void>();
    p.lse = lse.as<float>();
    return p;
}

Status StageData::run_summaries(Selector selector, const Buffer& rows, const Buffer& into) const {
    BlockSummaryParams p;
    set_key_sizes(problem(), &p);
    p.selector = selector;
    p.key = keys_view(rows);
    p.summaries = into.as<void>();
    return block_summaries(p, executor_);
}

Status StageData::run_block_summaries() const {
    return run_summaries(shape_.selector, key, summaries);
}

Status StageData::run_select_blocks() const { return select_blocks(select_params(), executor_); }

Status StageData::run_select_tokens() const {
    TokenSelectParams p;
    p.problem = problem();
    p.query = query_view();
    p.key = keys_view(key);
    p.topk = shape_.topk;
    p.threshold = threshold.as<float>();
    p.tie_index = tie_index.as<int32_t>();
    p.lse_full = lse_full.as<float>();
    return select_tokens(p, executor_);
}

AttentionParams StageData::lists_params() const {
    AttentionParams p = attention_params();
    p.block_indices = block_indices.as<int32_t>();
    p.block_counts = block_counts.as<int32_t>();
    p.max_blocks = list_width_;
    return p;
}

Status StageData::run_attend_lists() const { return attention(lists_params(), executor_); }

FarPoolsParams StageData::far_pools_params() const {
    FarPoolsParams p;
    set_key_sizes(problem(), &p);
    const int64_t head = num_blocks(shape_.kv_len) * shape_.head_dim;
    p.key = {key_means.as<void>(), head, shape_.head_dim};
    p.value = {value_means.as<void>(), head, shape_.head_dim};
    p.sums = far_sums.as<float>();
    p.means = far_means.as<void>();
    return p;
}

Status StageData::run_far_pools() const {
    Status status = run_summaries(Selector::kMean, key, key_means);
    if (status.ok()) status = run_summaries(Selector::kMean, value, value_means);
    return status.ok() ? far_pools(far_pools_params(), executor_) : status;
}

Status StageData::run_attend_far() const {
    const FarPoolsParams pools = far_pools_params();
    AttentionParams p = lists_params();
    p.far_field = {pools.key, pools.value, pools.sums, pools.means};
    p.omitted_mass_estimate = estimate.as<float>();
    return attention(p, executor_);
}

Status StageData::run_attend_tokens() const {
    AttentionParams p = attention_params();
    p.threshold = threshold.as<float>();
    p.tie_index = tie_index.as<int32_t>();
    return attention(p, executor_);
}

Status StageData::run_attend_ranges() const { return attention(attention_params(), executor_); }

Status StageData::run_omitted_mass() const {
    return run_omitted_mass_of(nullptr, shape_.query_len);
}

Status StageData::run_omitted_mass_of(const int64_t* rows, int64_t num_rows) const {
    OmittedMassParams p;
    p.problem = problem();
    p.query = query_view();
    p.key = keys_view(key);
    p.lse = lse.as<float>();
    p.rows = rows;
    p.num_rows = num_rows;
    p.omitted = omitted.as<float>();
    return omitted_mass(p, executor_);
}

Status StageData::run_merge_states() const {
    MergeStatesParams p;
    p.dtype = shape_.dtype;
    p.rows = rows_;
    p.head_dim = shape_.head_dim;
    p.out_a = p.out_b = out.as<void>();
    p.lse_a = p.lse_b = lse.as<float>();
    p.out = merged_out.as<void>();
    p.lse = merged_lse.as<float>();
    return merge_states(p, executor_);
}

}  // namespace condensate::bench
