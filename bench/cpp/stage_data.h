// Buffers and filled parameter structs of every stage, on the CPU or a GPU, for benchmarks and
// checks of the torch-free library.
#pragma once

#include <cstdint>
#include <vector>

#include "condensate/condensate.h"

namespace condensate::bench {

// Memory of exactly the bytes asked for, where the executor runs. Aborts when there is none.
class Buffer {
  public:
    Buffer() = default;
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    void allocate(const Executor& executor, int64_t bytes);  // once
    template <class T>
    T* as() const {
        return static_cast<T*>(data_);
    }
    int64_t bytes() const { return bytes_; }
    void write(const void* source, int64_t offset_bytes, int64_t count_bytes);
    void fill(uint8_t byte);
    void fill_random(DType dtype, uint64_t seed);  // roughly normal, never all zero
    std::vector<uint8_t> read() const;

  private:
    bool cuda_ = false;
    int64_t bytes_ = 0;
    void* data_ = nullptr;
};

struct Shape {
    int64_t batch = 1;
    int64_t query_heads = 32;
    int64_t kv_heads = 8;
    int64_t query_len = 0;
    int64_t kv_len = 0;
    int64_t head_dim = 128;
    int64_t window = 256;
    int64_t anchors = 64;
    int64_t topk = 1728;
    bool causal = true;
    DType dtype = DType::kBFloat16;
    Selector selector = Selector::kBlock;
};

// Inputs, outputs and intermediate results of all stages of one call. The stages may run in any
// order; each reads what the ones before it in the list below have written.
class StageData {
  public:
    StageData(const Shape& shape, const Executor& executor, uint64_t seed);

    Status run_block_summaries() const;
    Status run_select_blocks() const;
    Status run_select_tokens() const;
    Status run_attend_lists() const;
    Status run_far_pools() const;   // with the means of blocks that they are made of
    Status run_attend_far() const;  // lists and far field; the omitted mass is estimated
    Status run_attend_tokens() const;
    Status run_attend_ranges() const;  // anchors and window alone
    Status run_omitted_mass() const;
    Status run_omitted_mass_of(const int64_t* rows, int64_t num_rows) const;  // query_len at most
    Status run_merge_states() const;  // out and lse with themselves

    const Shape& shape() const { return shape_; }
    const Executor& executor() const { return executor_; }
    int64_t lists() const { return lists_; }
    int64_t list_width() const { return list_width_; }
    int64_t rows() const { return rows_; }

    Buffer query, key, value, summaries, block_indices, block_counts, estimate, threshold,
        tie_index, lse_full, out, lse, omitted, merged_out, merged_lse, workspace, key_means,
        value_means, far_sums, far_means;

  private:
    Problem problem() const;
    ConstTensor4 query_view() const;
    ConstTensor4 keys_view(const Buffer& keys) const;
    BlockSelectParams select_params() const;
    AttentionParams attention_params() const;
    AttentionParams lists_params() const;
    Status run_summaries(Selector selector, const Buffer& rows, const Buffer& into) const;
    FarPoolsParams far_pools_params() const;

    Shape shape_;
    Executor executor_;
    int64_t lists_;
    int64_t list_width_;
    int64_t rows_;
};

}  // namespace condensate::bench
