// 8-bit summaries of a cache. Compiled for the baseline: no multiply-add may round differently.
#include <cmath>
#include <limits>

#include "cpu/decode_rows.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace condensate::cpu {

float round_row(float* row, int dim) {
    float max = 0;
    for (int d = 0; d < dim; ++d) {
        const float x = std::fabs(row[d]);
        if (x > max || x != x) max = x;
    }
    const float levels = kSummaryLevels / max;
    if (!std::isfinite(max) || !std::isfinite(levels)) {
        std::fill(row, row + dim, 0.0f);
        return std::isfinite(max) ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    }
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    for (int d = 0; d < dim; ++d) row[d] = (row[d] * levels + kShift) - kShift;
    return max / kSummaryLevels;
}

float capped(float score, float softcap) {
    return softcap > 0 ? softcap * std::tanh(score / softcap) : score;
}

namespace {

struct SummaryScratch {
    float* rows;  // [kPoolKeys][dim]
    float* part;  // [dim], the sum of a unit
    float* mean;  // [dim]
};

// One pool of one sequence and KV head: the units of keys in it and its mean value.
class PoolSummary {
  public:
    PoolSummary(const UpdateSummariesParams& p, int64_t b, int64_t kv, int64_t length,
                const SummaryScratch& scratch)
        : p_(p),
          rows_(p.cache, b, kv, static_cast<int>(p.head_dim)),
          kv_(kv),
          length_(length),
          dim_(static_cast<int>(p.head_dim)),
          scratch_(scratch) {}

    void run(int64_t first_key, int64_t appended_begin, int pool) const {
        const int64_t page = rows_.page_of(first_key);
        if (page < 0) return;
        const int count = static_cast<int>(min_i64(pool, length_ - first_key));
        int32_t keys[kPoolKeys];
        bool there[kPoolKeys];
        for (int n = 0; n < count; ++n) keys[n] = static_cast<int32_t>(first_key) + n;
        rows_.load_keys(tile_ops(), keys, count, scratch_.rows, there);
        const int64_t slot = rows_.slot_of(first_key);
        for (int unit = 0; unit * kUnitKeys < count; ++unit) {
            const int begin = unit * kUnitKeys;
            const int end = static_cast<int>(min_i64(begin + kUnitKeys, count));
            if (first_key + end <= appended_begin) continue;
            sum_rows(begin, end, scratch_.mean);
            finish_key_mean(end - begin);
            store(page, slot / kUnitKeys + unit);
        }
        rows_.load_stored_values(tile_ops(), keys, count, scratch_.rows, there);
        std::fill(scratch_.mean, scratch_.mean + dim_, 0.0f);
        for (int begin = 0; begin < count; begin += kUnitKeys) {
            sum_rows(begin, static_cast<int>(min_i64(begin + kUnitKeys, count)), scratch_.part);
            for (int d = 0; d < dim_; ++d) scratch_.mean[d] += scratch_.part[d];
        }
        const float scale = p_.cache.value_scale != nullptr ? p_.cache.value_scale[kv_] : 1.0f;
        for (int d = 0; d < dim_; ++d)
            scratch_.mean[d] = scratch_.mean[d] / static_cast<float>(count) * scale;
        store(page, unit_rows(p_.cache.page_size) + slot / pool);
    }

  private:
    void sum_rows(int begin, int end, float* sum) const {
        std::fill(sum, sum + dim_, 0.0f);
        for (int n = begin; n < end; ++n)
            for (int d = 0; d < dim_; ++d) sum[d] += scratch_.rows[int64_t{n} * dim_ + d];
    }
    void finish_key_mean(int count) const {
        const float scale = rows_.key_scale();
        for (int d = 0; d < dim_; ++d)
            scratch_.mean[d] = scratch_.mean[d] / static_cast<float>(count) * scale;
        if (p_.summaries.key_center == nullptr) return;
        for (int d = 0; d < dim_; ++d) scratch_.mean[d] -= p_.summaries.key_center[kv_ * dim_ + d];
    }
    void store(int64_t page, int64_t row) const {
        const KvSummaries& s = p_.summaries;
        const float scale = round_row(scratch_.mean, dim_);
        int8_t* entries =
            s.rows + page * s.rows_stride_page + kv_ * s.rows_stride_head + row * dim_;
        for (int d = 0; d < dim_; ++d) entries[d] = static_cast<int8_t>(scratch_.mean[d]);
        s.scales[page * s.scales_stride_page + kv_ * s.scales_stride_head + row] = scale;
    }

    const UpdateSummariesParams& p_;
    SequenceRows rows_;
    int64_t kv_, length_;
    int dim_;
    const SummaryScratch& scratch_;
};

}  // namespace

Status update_kv_summaries(const UpdateSummariesParams& p, const Executor& executor,
                           uint32_t* errors) {
    const int pool = pool_keys(p.cache.page_size, p.cache.block_table != nullptr);
    // A piece of a sequence: so many pools that threads share a long prompt.
    constexpr int64_t kPoolsPerItem = 64;
    const int64_t most = min_i64(p.appended, p.cache.capacity());
    const int64_t pieces = ceil_div(ceil_div(most, pool) + 1, kPoolsPerItem);
    for (int64_t b = 0; b < p.batch; ++b) *errors |= cache_errors(p.cache, b, p.appended);
    auto layout = [&](Arena& arena) {
        return SummaryScratch{arena.take<float>(kPoolKeys * p.head_dim),
                              arena.take<float>(p.head_dim), arena.take<float>(p.head_dim)};
    };
    return for_each_item(
        executor, p.batch * p.kv_heads * pieces, layout,
        [&](int64_t item, SummaryScratch& scratch) {
            const int64_t piece = item % pieces, kv = item / pieces % p.kv_heads;
            const int64_t b = item / pieces / p.kv_heads;
            const int64_t end = cache_length(p.cache, b), begin = max_i64(end - p.appended, 0);
            if (begin == end) return;
            const PoolSummary summary(p, b, kv, end, scratch);
            const int64_t first = begin / pool + piece * kPoolsPerItem;
            const int64_t last = min_i64(first + kPoolsPerItem, ceil_div(end, pool));
            for (int64_t n = first; n < last; ++n) summary.run(n * pool, begin, pool);
        });
}

}  // namespace condensate::cpu
