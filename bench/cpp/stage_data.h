// Memory and runs of one call on the CPU or a GPU, for benchmarks and checks of the torch-free
// library.
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
    bool far_field = true;  // where the selector lists blocks
    float top_p = 0.0f;
    bool head_budgets = false;  // of all keys, half of them, and so on by KV head
};

// Inputs, outputs and workspace of one call, which runs as a whole or stage by stage.
class StageData {
  public:
    StageData(const Shape& shape, const Executor& executor, uint64_t seed);

    Status prepare();  // plans the call and allocates its workspace; before the next two
    Status run_call() const;
    Status run_stage(Stage stage) const;  // the first of this kind; those before it have run

    Status run_given_lists() const;  // attention over block_indices, block_counts
    Status run_given_far() const;    // with the far field and the estimate that it makes
    Status run_ranges() const;       // anchors and window alone
    Status run_omitted_mass() const;
    Status run_omitted_mass_of(const int64_t* rows, int64_t num_rows) const;  // query_len at most
    Status run_merge_states() const;  // out and lse with themselves

    const Shape& shape() const { return shape_; }
    const Executor& executor() const { return executor_; }
    const Plan& plan() const { return plan_; }
    int64_t lists() const { return lists_; }
    int64_t rows() const { return rows_; }

    Buffer query, key, value, head_keys, block_indices, block_counts, estimate, out, lse, omitted,
        merged_out, merged_lse, workspace;

  private:
    AttentionCall call() const;
    AttentionCall given_call(int64_t width) const;
    Status run_now(const AttentionCall& call) const;  // plans it first, in memory of its own

    Shape shape_;
    Executor executor_;
    int64_t lists_;
    int64_t list_width_;
    int64_t rows_;
    Plan plan_;
};

}  // namespace condensate::bench
