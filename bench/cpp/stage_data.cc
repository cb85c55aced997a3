#include "stage_data.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/call.h"
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
    rows_ = s.batch * s.query_heads * s.query_len;
    lists_ = s.batch * s.kv_heads * num_tiles(s.query_len, group);
    list_width_ = selector_traits(s.selector).lists_blocks ? s.topk / kBlockKeys : 0;

    for (Buffer* rows_by_dim : {&query, &out, &merged_out})
        rows_by_dim->allocate(executor, rows_ * s.head_dim * elem_bytes);
    for (Buffer* keys : {&key, &value})
        keys->allocate(executor, s.batch * s.kv_heads * s.kv_len * s.head_dim * elem_bytes);
    for (Buffer* a_row : {&estimate, &lse, &omitted, &merged_lse})
        a_row->allocate(executor, rows_ * 4);
    block_indices.allocate(executor, lists_ * list_width_ * 4);
    block_counts.allocate(executor, lists_ * 4);
    if (s.head_budgets) {
        std::vector<int32_t> budgets;
        for (int64_t head = 0; head < s.kv_heads; ++head)
            budgets.push_back(static_cast<int32_t>(s.topk / (head + 1)));
        head_keys.allocate(executor, s.kv_heads * 4);
        head_keys.write(budgets.data(), 0, head_keys.bytes());
    }
    query.fill_random(s.dtype, seed);
    key.fill_random(s.dtype, seed + 1);
    value.fill_random(s.dtype, seed + 2);
}

// What every call over these tensors shares.
AttentionCall StageData::call() const {
    auto view = [this](const Buffer& tensor, int64_t heads, int64_t length) {
        const int64_t head = length * shape_.head_dim;
        return ConstTensor4{tensor.as<void>(), heads * head, head, shape_.head_dim};
    };
    AttentionCall c;
    Problem& p = c.problem;
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
    c.query = view(query, p.query_heads, p.query_len);
    c.key = view(key, p.kv_heads, p.kv_len);
    c.value = view(value, p.kv_heads, p.kv_len);
    c.selector = shape_.selector;
    c.topk = shape_.topk;
    c.top_p = shape_.top_p;
    c.head_keys = head_keys.as<int32_t>();
    c.far_field = shape_.far_field && selector_traits(shape_.selector).lists_blocks;
    c.out = out.as<void>();
    c.lse = lse.as<float>();
    c.omitted_mass_estimate = estimate.as<float>();
    return c;
}

AttentionCall StageData::given_call(int64_t width) const {
    AttentionCall c = call();
    c.given_lists = true;
    c.block_indices = block_indices.as<int32_t>();
    c.block_counts = block_counts.as<int32_t>();
    c.max_blocks = width;
    c.far_field = false;
    c.omitted_mass_estimate = nullptr;
    return c;
}

Status StageData::prepare() {
    Status status = plan_attention(call(), executor_, &plan_);
    if (status.ok()) workspace.allocate(executor_, plan_.workspace_bytes);
    return status;
}

Status StageData::run_call() const {
    return run_attention(call(), plan_, workspace.as<void>(), executor_);
}

Status StageData::run_stage(Stage stage) const {
    for (int i = 0; i < plan_.num_stages; ++i)
        if (plan_.stages[i].stage == stage)
            return run_attention_stage(call(), plan_, i, workspace.as<void>(), executor_);
    die("the call has no such stage");
}

Status StageData::run_now(const AttentionCall& c) const {
    Plan plan;
    Status status = plan_attention(c, executor_, &plan);
    if (!status.ok()) return status;
    Buffer memory;
    memory.allocate(executor_, plan.workspace_bytes);
    return run_attention(c, plan, memory.as<void>(), executor_);
}

Status StageData::run_given_lists() const { return run_now(given_call(list_width_)); }

Status StageData::run_given_far() const {
    AttentionCall c = given_call(list_width_);
    c.far_field = true;
    c.omitted_mass_estimate = estimate.as<float>();
    return run_now(c);
}

Status StageData::run_ranges() const { return run_now(given_call(/*width=*/0)); }

Status StageData::run_omitted_mass() const {
    return run_omitted_mass_of(nullptr, shape_.query_len);
}

Status StageData::run_omitted_mass_of(const int64_t* audited, int64_t num_rows) const {
    const AttentionCall c = call();
    OmittedMassParams p;
    p.problem = c.problem;
    p.query = c.query;
    p.key = c.key;
    p.lse = c.lse;
    p.rows = audited;
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
