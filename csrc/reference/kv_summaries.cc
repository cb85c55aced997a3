#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/decode.h"
#include "reference/reference.h"

namespace condensate::reference {

CachedSequence::CachedSequence(const KvCache& cache, int64_t batch_index, uint32_t* errors)
    : cache_(cache), batch_index_(batch_index), errors_(errors) {
    const int64_t given = cache.lengths[batch_index];
    length_ = max_i64(min_i64(given, cache.capacity()), 0);
    if (length_ != given) *errors |= kErrorCacheLength;
}

int64_t CachedSequence::page_of(int64_t key) const {
    if (cache_.block_table == nullptr) return batch_index_;
    const int64_t page =
        cache_.block_table[batch_index_ * cache_.max_pages + key / cache_.page_size];
    if (page >= 0 && page < cache_.num_pages) return page;
    *errors_ |= kErrorBlockTable;
    return -1;
}

float CachedSequence::stored_key(int64_t kv_head, int64_t key, int64_t d) const {
    return load_number(cache_.dtype, cache_.key,
                       page_of(key) * cache_.key_stride_page + kv_head * cache_.key_stride_head +
                           slot_of(key) * cache_.key_stride_token + d);
}

float CachedSequence::stored_value(int64_t kv_head, int64_t key, int64_t d) const {
    return load_number(cache_.dtype, cache_.value,
                       page_of(key) * cache_.value_stride_page +
                           kv_head * cache_.value_stride_head +
                           slot_of(key) * cache_.value_stride_token + d);
}

float CachedSequence::key_scale(int64_t kv_head) const {
    return cache_.key_scale != nullptr ? cache_.key_scale[kv_head] : 1.0f;
}

float CachedSequence::value_scale(int64_t kv_head) const {
    return cache_.value_scale != nullptr ? cache_.value_scale[kv_head] : 1.0f;
}

RoundedRow round_row(const std::vector<float>& row) {
    RoundedRow rounded;
    rounded.entries.assign(row.size(), 0);
    float max = 0;
    for (float x : row)
        if (std::fabs(x) > max || x != x) max = std::fabs(x);
    if (!std::isfinite(max)) {
        rounded.scale = std::numeric_limits<float>::quiet_NaN();
        return rounded;
    }
    const float levels = kSummaryLevels / max;
    if (!std::isfinite(levels)) return rounded;  // max is 0, or too small for a quotient
    rounded.scale = max / kSummaryLevels;
    for (size_t d = 0; d < row.size(); ++d)
        rounded.entries[d] = static_cast<int8_t>(std::nearbyint(row[d] * levels));
    return rounded;
}

namespace {

// The sum over keys [begin, end) of one element, by units of keys: the order in which all paths
// add, so that they agree to the bit.
template <class Element>
float sum_by_units(int64_t begin, int64_t end, const Element& element) {
    float sum = 0;
    for (int64_t unit = begin; unit < end; unit += kUnitKeys) {
        float part = 0;
        for (int64_t j = unit; j < min_i64(unit + kUnitKeys, end); ++j) part += element(j);
        sum += part;
    }
    return sum;
}

void store_row(const UpdateSummariesParams& p, int64_t page, int64_t kv_head, int64_t row,
               const std::vector<float>& mean) {
    const KvSummaries& s = p.summaries;
    const RoundedRow rounded = round_row(mean);
    int8_t* entries =
        s.rows + page * s.rows_stride_page + kv_head * s.rows_stride_head + row * p.head_dim;
    std::copy(rounded.entries.begin(), rounded.entries.end(), entries);
    s.scales[page * s.scales_stride_page + kv_head * s.scales_stride_head + row] = rounded.scale;
}

void summarise_unit(const UpdateSummariesParams& p, const CachedSequence& sequence, int64_t kv_head,
                    int64_t unit) {
    const int64_t begin = unit * kUnitKeys, end = min_i64(begin + kUnitKeys, sequence.length());
    const int64_t page = sequence.page_of(begin);
    if (page < 0) return;
    std::vector<float> mean(static_cast<size_t>(p.head_dim));
    for (int64_t d = 0; d < p.head_dim; ++d) {
        const float sum =
            sum_by_units(begin, end, [&](int64_t j) { return sequence.stored_key(kv_head, j, d); });
        float x = sum / static_cast<float>(end - begin) * sequence.key_scale(kv_head);
        if (p.summaries.key_center != nullptr)
            x -= p.summaries.key_center[kv_head * p.head_dim + d];
        mean[static_cast<size_t>(d)] = x;
    }
    store_row(p, page, kv_head, sequence.slot_of(begin) / kUnitKeys, mean);
}

void summarise_pool(const UpdateSummariesParams& p, const CachedSequence& sequence, int64_t kv_head,
                    int64_t pool) {
    const int keys = pool_keys(p.cache.page_size, p.cache.block_table != nullptr);
    const int64_t begin = pool * keys, end = min_i64(begin + keys, sequence.length());
    const int64_t page = sequence.page_of(begin);
    if (page < 0) return;
    std::vector<float> mean(static_cast<size_t>(p.head_dim));
    for (int64_t d = 0; d < p.head_dim; ++d) {
        const float sum = sum_by_units(
            begin, end, [&](int64_t j) { return sequence.stored_value(kv_head, j, d); });
        mean[static_cast<size_t>(d)] =
            sum / static_cast<float>(end - begin) * sequence.value_scale(kv_head);
    }
    store_row(p, page, kv_head, unit_rows(p.cache.page_size) + sequence.slot_of(begin) / keys,
              mean);
}

}  // namespace

void update_kv_summaries(const UpdateSummariesParams& p, uint32_t* errors) {
    const int pool = pool_keys(p.cache.page_size, p.cache.block_table != nullptr);
    for (int64_t b = 0; b < p.batch; ++b) {
        const CachedSequence sequence(p.cache, b, errors);
        const int64_t end = sequence.length();
        const int64_t begin = max_i64(end - p.appended, 0);
        if (begin == end) continue;
        for (int64_t kv = 0; kv < p.kv_heads; ++kv) {
            for (int64_t u = begin / kUnitKeys; u < ceil_div(end, kUnitKeys); ++u)
                summarise_unit(p, sequence, kv, u);
            for (int64_t v = begin / pool; v < ceil_div(end, pool); ++v)
                summarise_pool(p, sequence, kv, v);
        }
    }
}

}  // namespace condensate::reference
