// Queries that select: shortlist, exact scores, list, attention over the list, the rest condensed.
// One item is one query of one KV head, for all heads of the group.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/decode.h"
#include "cpu/parallel.h"

namespace condensate::cpu {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

struct SelectScratch {
    QueryTile queries;
    float* row;          // [dim]
    float* tile;         // [kTileKeys][dim] of keys, then of values
    float* tile_scores;  // [kTileKeys][kScoreStride]
    float* out;          // [kMaxRows][dim]
    SoftmaxState* state;
    float* ranks;       // of units, then of candidates
    uint32_t* order;    // the same as integers
    int32_t* best;      // indices of the best
    int32_t* keys;      // of the slots: anchors, shortlisted or given candidates, recent keys
    float* scores;      // [group][slots]
    bool* listed;       // of the candidates
    float* rest;        // scores of what is left over, one head
    uint8_t* left;      // candidates of every unit that was not looked into
    bool* shortlisted;  // of every unit
};

// The `count` largest of n ranks, as indices; ties to the lower. In ascending order.
int64_t best_of(const TileOps& ops, const float* ranks, int64_t n, int64_t count, uint32_t* order,
                int32_t* best) {
    if (count >= n) {
        for (int64_t j = 0; j < n; ++j) best[j] = static_cast<int32_t>(j);
        return n;
    }
    if (count == 0) return 0;
    ops.order_keys(ranks, n, order);
    uint32_t* sorted = order + n;
    std::copy(order, order + n, sorted);
    std::nth_element(sorted, sorted + count - 1, sorted + n, std::greater<uint32_t>());
    const uint32_t threshold = sorted[count - 1];
    int64_t ties =
        count - std::count_if(order, order + n, [&](uint32_t x) { return x > threshold; });
    int64_t taken = 0;
    for (int64_t j = 0; j < n && taken < count; ++j) {
        if (order[j] < threshold || (order[j] == threshold && ties-- <= 0)) continue;
        best[taken++] = static_cast<int32_t>(j);
    }
    return taken;
}

class SelectItem {
  public:
    SelectItem(DecodeCall& call, int64_t b, int64_t kv, int64_t i, int64_t max_slots,
               SelectScratch& scratch)
        : call_(call),
          p_(call.p),
          s_(scratch),
          b_(b),
          kv_(kv),
          i_(i),
          span_(call.span(b, i)),
          sequence_(call.rows_of(b, kv)),
          slots_stride_(max_slots),
          panels_(static_cast<int>(ceil_div(call.group, kPanelRows))) {}

    void run() {
        for (int j = 0; j < span_.anchors_end; ++j) s_.keys[slots_++] = j;
        if (p_.mode == DecodeMode::kGivenTokens)
            take_given();
        else
            shortlist();
        candidates_end_ = slots_;
        for (int j = span_.recent_begin; j < span_.visible; ++j) s_.keys[slots_++] = j;
        score_slots();
        if (p_.mode == DecodeMode::kGivenTokens)
            std::fill(s_.listed, s_.listed + candidates(), true);
        else
            list_tokens();
        if (p_.mode != DecodeMode::kSelect) attend();
    }

  private:
    int64_t candidates() const { return candidates_end_ - span_.anchors_end; }
    int64_t list() const { return (b_ * p_.kv_heads + kv_) * p_.query_len + i_; }
    float* scores_of(int g) const { return s_.scores + g * slots_stride_; }
    float* unit_scores(int g) const { return call_.scores_of_units(call_.row(b_, kv_, i_, g)); }

    void take_given() {
        const int32_t* tokens = p_.token_indices + list() * p_.topk;
        int64_t count = p_.token_counts[list()];
        if (count < 0 || count > p_.topk) {
            call_.errors |= kErrorBlockCount;
            count = count < 0 ? 0 : p_.topk;
        }
        int32_t previous = -1;
        for (int64_t n = 0; n < count; ++n) {
            if (tokens[n] <= previous || tokens[n] >= span_.visible) {
                call_.errors |= kErrorTokenIndex;
                continue;
            }
            previous = tokens[n];
            if (span_.is_candidate(previous)) s_.keys[slots_++] = previous;
        }
    }

    // Candidates of the heaviest units.
    void shortlist() {
        const int64_t first = span_.first_unit(), units = max_i64(span_.end_unit() - first, 0);
        std::fill(s_.ranks, s_.ranks + units, kMinusInfinity);
        for (int g = 0; g < call_.group; ++g) {
            const float* scores = unit_scores(g);
            const float lse = call_.ops.log_sum_exp(scores, span_.units) + std::log(8.0f);
            for (int64_t u = 0; u < units; ++u) {
                const float rank = scores[first + u] - lse;
                if (rank > s_.ranks[u]) s_.ranks[u] = rank;
            }
        }
        // A unit whose page is missing holds no candidates.
        int64_t there = 0;
        for (int64_t u = 0; u < units; ++u) {
            if (sequence_.page_of((first + u) * kUnitKeys) < 0) continue;
            s_.rest[there] = s_.ranks[u];
            s_.keys[slots_ + there++] = static_cast<int32_t>(first + u);
        }
        const int64_t count =
            best_of(call_.ops, s_.rest, there, p_.shortlist / kUnitKeys, s_.order, s_.best);
        std::fill(s_.shortlisted, s_.shortlisted + span_.end_unit(), false);
        for (int64_t n = 0; n < count; ++n) s_.shortlisted[s_.keys[slots_ + s_.best[n]]] = true;
        for (int64_t u = first; u < first + units; ++u) {
            if (!s_.shortlisted[u]) continue;
            const int64_t end = min_i64((u + 1) * kUnitKeys, span_.recent_begin);
            for (int64_t j = max_i64(u * kUnitKeys, span_.anchors_end); j < end; ++j)
                s_.keys[slots_++] = static_cast<int32_t>(j);
        }
    }

    void score_slots() {
        s_.queries.clear(call_.group);
        for (int g = 0; g < call_.group; ++g) {
            call_.load_query(b_, kv_, i_, g, s_.row);
            s_.queries.put(s_.row, g);
        }
        const float scale = p_.scale * sequence_.key_scale();
        for (int64_t first = 0; first < slots_; first += kTileKeys) {
            const int count = static_cast<int>(min_i64(kTileKeys, slots_ - first));
            bool there[kTileKeys];
            sequence_.load_keys(call_.ops, s_.keys + first, count, s_.tile, there);
            s_.queries.score(call_.ops, s_.tile, call_.group, scale, s_.tile_scores);
            for (int g = 0; g < call_.group; ++g)
                for (int n = 0; n < count; ++n) {
                    const float score = capped(s_.tile_scores[n * kScoreStride + g], p_.softcap);
                    scores_of(g)[first + n] = there[n] ? score : kMinusInfinity;
                }
        }
    }

    void list_tokens() {
        const int64_t n = candidates();
        std::fill(s_.ranks, s_.ranks + n, kMinusInfinity);
        for (int g = 0; g < call_.group; ++g) {
            const float z = call_.ops.log_sum_exp(scores_of(g), slots_);
            const float* scores = scores_of(g) + span_.anchors_end;
            for (int64_t c = 0; c < n; ++c)
                if (scores[c] - z > s_.ranks[c]) s_.ranks[c] = scores[c] - z;
        }
        int64_t count = best_of(call_.ops, s_.ranks, n, p_.topk, s_.order, s_.best);
        std::fill(s_.listed, s_.listed + n, false);
        for (int64_t k = 0; k < count; ++k) s_.listed[s_.best[k]] = true;
        if (p_.top_p > 0) count = cut_to_mass(n, count);
        store_list(n, count);
    }

    // Drops the lightest tokens while all that is left out holds at most 1 - top_p.
    int64_t cut_to_mass(int64_t n, int64_t count) {
        double rest = 0;
        for (int64_t c = 0; c < n; ++c)
            if (!s_.listed[c]) rest += std::exp(static_cast<double>(s_.ranks[c]));
        std::sort(s_.best, s_.best + count, [&](int32_t a, int32_t b) {
            return s_.ranks[a] != s_.ranks[b] ? s_.ranks[a] > s_.ranks[b] : a < b;
        });
        while (count > 0) {
            rest += std::exp(static_cast<double>(s_.ranks[s_.best[count - 1]]));
            if (rest > 1.0 - static_cast<double>(p_.top_p)) break;
            s_.listed[s_.best[--count]] = false;
        }
        return count;
    }

    void store_list(int64_t n, int64_t count) const {
        if (p_.token_counts != nullptr) p_.token_counts[list()] = static_cast<int32_t>(count);
        if (p_.token_indices == nullptr) return;
        int32_t* tokens = p_.token_indices + list() * p_.topk;
        std::fill(tokens, tokens + p_.topk, -1);
        for (int64_t c = 0; c < n; ++c)
            if (s_.listed[c]) *tokens++ = s_.keys[span_.anchors_end + c];
    }

    // ---- Attention ----

    void attend() {
        std::fill(s_.out, s_.out + int64_t{panels_} * kPanelRows * call_.dim, 0.0f);
        std::fill(s_.state->max, s_.state->max + kMaxRows, kMinusInfinity);
        std::fill(s_.state->sum, s_.state->sum + kMaxRows, 0.0f);
        std::fill(s_.state->sum_error, s_.state->sum_error + kMaxRows, 0.0f);
        attend_keys();
        const bool condenses = p_.mode == DecodeMode::kSelectAndAttend;
        if (condenses) count_left();
        for (int g = 0; g < call_.group; ++g) {
            const int64_t row = call_.row(b_, kv_, i_, g);
            set_estimate(call_, row, condenses ? omitted_share(g) : 0.0f);
        }
        if (condenses && p_.far_field) attend_pools();
        for (int g = 0; g < call_.group; ++g)
            finish_row(call_, b_, kv_, i_, g, sum_of(g), s_.out + int64_t{g} * call_.dim);
    }

    RowSum sum_of(int g) const {
        return {s_.state->max[g], static_cast<double>(s_.state->sum[g]) - s_.state->sum_error[g]};
    }

    // Scores of a tile that is not full, and of rows that are none, weigh nothing.
    void clear_scores(int count) {
        for (int n = 0; n < kTileKeys; ++n)
            std::fill_n(s_.tile_scores + n * kScoreStride + (n < count ? call_.group : 0),
                        panels_ * kPanelRows - (n < count ? call_.group : 0), kMinusInfinity);
        std::fill(s_.tile + int64_t{count} * call_.dim, s_.tile + int64_t{kTileKeys} * call_.dim,
                  0.0f);
    }

    void accumulate_tile(int count) {
        clear_scores(count);
        call_.ops.softmax(panels_, s_.tile_scores, s_.state);
        call_.ops.accumulate(s_.tile_scores, s_.tile, call_.dim, accumulated_rows(call_.group),
                             s_.state->rescale, s_.out);
    }

    void attend_keys() {
        int32_t keys[kTileKeys];
        int count = 0;
        for (int64_t slot = 0; slot <= slots_; ++slot) {
            if (count == kTileKeys || (slot == slots_ && count > 0)) {
                bool there[kTileKeys];
                sequence_.load_values(call_.ops, keys, count, s_.tile, there);
                accumulate_tile(count);
                count = 0;
            }
            const bool candidate = slot >= span_.anchors_end && slot < candidates_end_;
            if (slot == slots_ || (candidate && !s_.listed[slot - span_.anchors_end])) continue;
            for (int g = 0; g < call_.group; ++g)
                s_.tile_scores[count * kScoreStride + g] = scores_of(g)[slot];
            keys[count++] = s_.keys[slot];
        }
    }

    // How many candidates every unit has that was not looked into.
    void count_left() {
        const int64_t units = call_.pool / kUnitKeys, end = span_.end_unit();
        std::fill(s_.left, s_.left + ceil_div(end, units) * units, uint8_t{0});
        for (int64_t u = span_.first_unit(); u < end; ++u) {
            if (s_.shortlisted[u] || sequence_.page_of(u * kUnitKeys) < 0) continue;
            const int64_t first = max_i64(u * kUnitKeys, span_.anchors_end);
            s_.left[u] =
                static_cast<uint8_t>(min_i64((u + 1) * kUnitKeys, span_.recent_begin) - first);
        }
    }

    // Turns the unit scores of a head into logarithms of their weights, log n_u + s_u, and returns
    // the share of the mass that is not attended.
    float omitted_share(int g) {
        float* weights = unit_scores(g);
        const int64_t end = span_.end_unit();
        for (int64_t u = 0; u < end; ++u)
            weights[u] = s_.left[u] > 0 ? weights[u] + kLog[s_.left[u]] : kMinusInfinity;
        const float* scores = scores_of(g) + span_.anchors_end;
        int64_t n = 0;
        for (int64_t c = 0; c < candidates(); ++c)
            if (!s_.listed[c]) s_.rest[n++] = scores[c];
        const float both[] = {call_.ops.log_sum_exp(weights, end),
                              call_.ops.log_sum_exp(s_.rest, n)};
        const float omitted = call_.ops.log_sum_exp(both, 2);
        if (omitted == kMinusInfinity) return 0;
        const RowSum attended = sum_of(g);
        return static_cast<float>(
            1 / (1 + std::exp(attended.max - static_cast<double>(omitted)) * attended.sum));
    }

    void attend_pools() {
        const int64_t units = call_.pool / kUnitKeys;
        const int64_t pools = ceil_div(span_.end_unit(), units);
        int count = 0;
        for (int64_t pool = 0; pool <= pools; ++pool) {
            if (count == kTileKeys || (pool == pools && count > 0)) {
                accumulate_tile(count);
                count = 0;
            }
            if (pool == pools) break;
            const uint8_t* left = s_.left + pool * units;
            if (std::all_of(left, left + units, [](uint8_t n) { return n == 0; })) continue;
            const int64_t end = min_i64(units, span_.end_unit() - pool * units);
            for (int g = 0; g < call_.group; ++g)
                s_.tile_scores[count * kScoreStride + g] =
                    call_.ops.log_sum_exp(unit_scores(g) + pool * units, end);
            load_pool_value(pool, s_.tile + int64_t{count} * call_.dim);
            ++count;
        }
    }

    void load_pool_value(int64_t pool, float* target) const {
        const KvSummaries& s = p_.summaries;
        const int64_t key = pool * call_.pool, page = sequence_.page_of(key);
        const int64_t row = unit_rows(p_.cache.page_size) + sequence_.slot_of(key) / call_.pool;
        call_.ops.load_int8_rows(
            s.rows + page * s.rows_stride_page + kv_ * s.rows_stride_head + row * call_.dim, 0, 1,
            call_.dim, target, call_.dim);
        const float scale =
            s.scales[page * s.scales_stride_page + kv_ * s.scales_stride_head + row];
        for (int d = 0; d < call_.dim; ++d) target[d] *= scale;
    }

    static constexpr float kLog[kUnitKeys + 1] = {0,           0,           0.69314718f,
                                                  1.09861229f, 1.38629436f, 1.60943791f,
                                                  1.79175947f, 1.94591015f, 2.07944154f};

    DecodeCall& call_;
    const DecodeParams& p_;
    SelectScratch& s_;
    int64_t b_, kv_, i_;
    DecodeSpan span_;
    SequenceRows sequence_;
    int64_t slots_stride_;
    int panels_;
    int64_t slots_ = 0, candidates_end_ = 0;
};

}  // namespace

Status select_and_attend(DecodeCall& call) {
    const DecodeParams& p = call.p;
    const int64_t units = ceil_div(call.longest, kUnitKeys) + call.pool;
    const int64_t chosen = p.mode == DecodeMode::kGivenTokens ? p.topk : p.shortlist;
    const int64_t slots =
        ceil_div(
            min_i64(call.longest, min_i64(p.anchors, call.longest) + min_i64(chosen, call.longest) +
                                      min_i64(p.window, call.longest) + call.pool),
            kTileKeys) *
        kTileKeys;
    const int64_t ranked = max_i64(units, slots);
    const int64_t rows = ceil_div(call.group, kPanelRows) * kPanelRows;
    auto layout = [&](Arena& arena) {
        return SelectScratch{{arena.take<float>(rows * call.dim), call.group, call.dim},
                             arena.take<float>(call.dim),
                             arena.take<float>(int64_t{kTileKeys} * call.dim),
                             arena.take<float>(int64_t{kTileKeys} * kScoreStride),
                             arena.take<float>(rows * call.dim),
                             arena.take<SoftmaxState>(1),
                             arena.take<float>(ranked),
                             arena.take<uint32_t>(2 * ranked),
                             arena.take<int32_t>(ranked),
                             arena.take<int32_t>(slots + units),
                             arena.take<float>(call.group * slots),
                             arena.take<bool>(slots),
                             arena.take<float>(ranked),
                             arena.take<uint8_t>(units),
                             arena.take<bool>(units)};
    };
    return for_each_item(call.executor, p.batch * p.kv_heads * p.query_len, layout,
                         [&](int64_t n, SelectScratch& scratch) {
                             const int64_t i = n % p.query_len, b_kv = n / p.query_len;
                             const int64_t b = b_kv / p.kv_heads, kv = b_kv % p.kv_heads;
                             if (call.is_dense(b, i)) return;
                             SelectItem(call, b, kv, i, slots, scratch).run();
                         });
}

}  // namespace condensate::cpu
