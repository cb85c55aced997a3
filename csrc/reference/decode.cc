// Decoding over a cache, as docs/decoding.md states it: one (sequence, KV head, query) at a time.
#include "reference/decode.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/access.h"
#include "reference/reference.h"

namespace condensate::reference {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

// One query of one KV head: what its heads see, and how they score it.
class QueryView {
  public:
    QueryView(const DecodeParams& p, const CachedSequence& sequence, int64_t b, int64_t kv,
              int64_t i)
        : p_(p),
          sequence_(sequence),
          b_(b),
          kv_(kv),
          i_(i),
          pool_(pool_keys(p.cache.page_size, p.cache.block_table != nullptr)),
          span(decode_span(sequence.length() - p.query_len + i, p.window, p.anchors, pool_)) {
        for (int g = 0; g < p.group(); ++g) {
            std::vector<float> row(static_cast<size_t>(p.head_dim));
            for (int64_t d = 0; d < p.head_dim; ++d) row[static_cast<size_t>(d)] = query(g)[d];
            rounded_queries_.push_back(round_row(row));
        }
    }

    Row query(int g) const { return row_of(p_.query, p_.dtype, b_, head(g), i_); }
    int64_t head(int g) const { return kv_ * p_.group() + g; }
    int64_t row(int g) const { return (b_ * p_.query_heads + head(g)) * p_.query_len + i_; }
    int64_t list() const { return (b_ * p_.kv_heads + kv_) * p_.query_len + i_; }
    int pool() const { return pool_; }

    bool is_there(int64_t key) const { return sequence_.page_of(key) >= 0; }
    bool is_attended_anyway(int64_t key) const {
        return !span.is_candidate(static_cast<int32_t>(key));
    }

    double key_score(int g, int64_t key) const {
        const Row q = query(g);
        double sum = 0;
        for (int64_t d = 0; d < p_.head_dim; ++d)
            sum += static_cast<double>(q[d]) * sequence_.stored_key(kv_, key, d);
        return capped(static_cast<double>(p_.scale) * sequence_.key_scale(kv_) * sum);
    }
    double value(int64_t key, int64_t d) const {
        return static_cast<double>(sequence_.stored_value(kv_, key, d)) *
               sequence_.value_scale(kv_);
    }

    double unit_score(int g, int64_t unit) const {
        const RoundedRow& q = rounded_queries_[static_cast<size_t>(g)];
        const SummaryRow u = summary_row(unit * kUnitKeys, false);
        double sum = 0;
        for (int64_t d = 0; d < p_.head_dim; ++d)
            sum += static_cast<double>(q.entries[static_cast<size_t>(d)]) * u.entries[d];
        sum *= static_cast<double>(q.scale) * u.scale;
        if (p_.summaries.key_center != nullptr)
            sum += dot<double>(query(g), p_.summaries.key_center + kv_ * p_.head_dim, p_.head_dim);
        return capped(static_cast<double>(p_.scale) * sum);
    }
    double pool_value(int64_t pool, int64_t d) const {
        const SummaryRow row = summary_row(pool * pool_, true);
        return static_cast<double>(row.scale) * row.entries[d];
    }

  private:
    struct SummaryRow {
        const int8_t* entries;
        float scale;
    };
    SummaryRow summary_row(int64_t key, bool of_value) const {
        const KvSummaries& s = p_.summaries;
        const int64_t page = sequence_.page_of(key), slot = sequence_.slot_of(key);
        const int64_t row =
            of_value ? unit_rows(p_.cache.page_size) + slot / pool_ : slot / kUnitKeys;
        return {s.rows + page * s.rows_stride_page + kv_ * s.rows_stride_head + row * p_.head_dim,
                s.scales[page * s.scales_stride_page + kv_ * s.scales_stride_head + row]};
    }
    double capped(double score) const {
        return p_.softcap > 0 ? p_.softcap * std::tanh(score / p_.softcap) : score;
    }

    const DecodeParams& p_;
    const CachedSequence& sequence_;
    int64_t b_, kv_, i_;
    int pool_;
    std::vector<RoundedRow> rounded_queries_;

  public:
    const DecodeSpan span;
};

// The greatest over the heads of `mass` in logarithms; a NaN counts as no mass.
template <class Mass>
double group_rank(int group, const Mass& mass) {
    double rank = kMinusInfinity;
    for (int g = 0; g < group; ++g) {
        const double m = mass(g);
        if (m > rank) rank = m;
    }
    return rank;
}

// The first `count` of `indices` by falling rank; ties to the lower index.
struct Ranked {
    int64_t index;
    double rank;
};
void keep_best(std::vector<Ranked>* ranked, int64_t count) {
    std::sort(ranked->begin(), ranked->end(), [](const Ranked& a, const Ranked& b) {
        return a.rank != b.rank ? a.rank > b.rank : a.index < b.index;
    });
    if (static_cast<int64_t>(ranked->size()) > count) ranked->resize(static_cast<size_t>(count));
}

// What a query attends beside anchors and recent keys, and how it came about.
struct Selection {
    std::vector<char> shortlisted;  // a flag per unit
    std::vector<char> listed;       // a flag per key
};

// Step 3 and 4: the units of the shortlist.
std::vector<char> shortlist_units(const DecodeParams& p, const QueryView& view) {
    const DecodeSpan& span = view.span;
    std::vector<double> lse;
    for (int g = 0; g < p.group(); ++g) {
        std::vector<double> scores;
        for (int64_t u = 0; u < span.units; ++u)
            if (view.is_there(u * kUnitKeys))
                scores.push_back(view.unit_score(g, u) + std::log(static_cast<double>(kUnitKeys)));
        lse.push_back(log_sum(scores));
    }
    std::vector<Ranked> units;
    for (int64_t u = span.first_unit(); u < span.end_unit(); ++u)
        if (view.is_there(u * kUnitKeys))
            units.push_back({u, group_rank(p.group(), [&](int g) {
                                 return view.unit_score(g, u) - lse[static_cast<size_t>(g)];
                             })});
    keep_best(&units, p.shortlist / kUnitKeys);
    std::vector<char> shortlisted(static_cast<size_t>(span.end_unit()), 0);
    for (const Ranked& unit : units) shortlisted[static_cast<size_t>(unit.index)] = 1;
    return shortlisted;
}

// Cuts a list in rank order to the fewest entries whose rest, `all` without them, holds at most
// 1 - top_p.
int64_t top_p_count(const std::vector<Ranked>& all, float top_p) {
    double rest = 0;
    int64_t count = static_cast<int64_t>(all.size());
    while (count > 0) {
        rest += std::exp(all[static_cast<size_t>(count - 1)].rank);
        if (rest > 1.0 - static_cast<double>(top_p)) break;
        --count;
    }
    return count;
}

// Step 5 and 6: the tokens of the shortlist that are attended.
std::vector<char> list_tokens(const DecodeParams& p, const QueryView& view,
                              const std::vector<char>& shortlisted) {
    const DecodeSpan& span = view.span;
    std::vector<char> scored(static_cast<size_t>(span.visible), 0);
    for (int64_t j = 0; j < span.visible; ++j)
        scored[static_cast<size_t>(j)] =
            view.is_there(j) &&
            (view.is_attended_anyway(j) || shortlisted[static_cast<size_t>(j / kUnitKeys)] != 0);
    std::vector<double> log_z;
    for (int g = 0; g < p.group(); ++g) {
        std::vector<double> scores;
        for (int64_t j = 0; j < span.visible; ++j)
            if (scored[static_cast<size_t>(j)]) scores.push_back(view.key_score(g, j));
        log_z.push_back(log_sum(scores));
    }
    std::vector<Ranked> tokens;
    for (int64_t j = span.anchors_end; j < span.recent_begin; ++j)
        if (scored[static_cast<size_t>(j)])
            tokens.push_back({j, group_rank(p.group(), [&](int g) {
                                  return view.key_score(g, j) - log_z[static_cast<size_t>(g)];
                              })});
    keep_best(&tokens, static_cast<int64_t>(tokens.size()));
    int64_t count = min_i64(p.topk, static_cast<int64_t>(tokens.size()));
    if (p.top_p > 0) count = min_i64(count, top_p_count(tokens, p.top_p));
    std::vector<char> listed(static_cast<size_t>(span.visible), 0);
    for (int64_t n = 0; n < count; ++n)
        listed[static_cast<size_t>(tokens[static_cast<size_t>(n)].index)] = 1;
    return listed;
}

// The valid entries of a list from the caller as a flag per key.
std::vector<char> given_tokens(const DecodeParams& p, const QueryView& view, uint32_t* errors) {
    const int32_t* tokens = p.token_indices + view.list() * p.topk;
    int64_t count = p.token_counts[view.list()];
    if (count < 0 || count > p.topk) {
        *errors |= kErrorBlockCount;
        count = count < 0 ? 0 : p.topk;
    }
    std::vector<char> listed(static_cast<size_t>(view.span.visible), 0);
    int32_t previous = -1;
    for (int64_t n = 0; n < count; ++n) {
        if (tokens[n] <= previous || tokens[n] >= view.span.visible) {
            *errors |= kErrorTokenIndex;
            continue;
        }
        previous = tokens[n];
        listed[static_cast<size_t>(previous)] = 1;
    }
    return listed;
}

void store_list(const DecodeParams& p, const QueryView& view, const std::vector<char>& listed) {
    int32_t count = 0;
    for (size_t j = 0; j < listed.size(); ++j) {
        if (!listed[j]) continue;
        if (p.token_indices != nullptr)
            p.token_indices[view.list() * p.topk + count] = static_cast<int32_t>(j);
        ++count;
    }
    if (p.token_counts != nullptr) p.token_counts[view.list()] = count;
    if (p.token_indices != nullptr)
        std::fill_n(p.token_indices + view.list() * p.topk + count, p.topk - count, -1);
}

// What enters a row's softmax: a key, or a pool by its weight.
struct Term {
    double score;  // of a pool the logarithm of its weight
    int64_t index;
    bool is_pool;
};

// What is left over of a sequence, for one head.
struct Rest {
    std::vector<Term> pools;       // of the units that were not looked into
    double mass = kMinusInfinity;  // logarithm of all that is not attended
};

// log(n_u) + s_u of a unit that is not shortlisted; -inf where it has no candidates.
double unit_weight(const QueryView& view, int g, int64_t unit) {
    double keys = 0;
    for (int64_t j = unit * kUnitKeys; j < (unit + 1) * kUnitKeys; ++j)
        if (!view.is_attended_anyway(j) && view.is_there(j)) keys += 1;
    return keys == 0 ? kMinusInfinity : std::log(keys) + view.unit_score(g, unit);
}

Rest rest_of(const QueryView& view, int g, const Selection& selection) {
    Rest rest;
    std::vector<double> masses;
    const int64_t units = view.pool() / kUnitKeys, end = view.span.end_unit();
    for (int64_t first = 0; first < end; first += units) {
        std::vector<double> weights;
        for (int64_t unit = first; unit < min_i64(first + units, end); ++unit) {
            if (selection.shortlisted[static_cast<size_t>(unit)] != 0) continue;
            const double weight = unit_weight(view, g, unit);
            if (weight != kMinusInfinity) weights.push_back(weight);
        }
        masses.insert(masses.end(), weights.begin(), weights.end());
        if (!weights.empty()) rest.pools.push_back({log_sum(weights), first / units, true});
    }
    for (int64_t j = view.span.anchors_end; j < view.span.recent_begin; ++j)
        if (selection.shortlisted[static_cast<size_t>(j / kUnitKeys)] != 0 &&
            selection.listed[static_cast<size_t>(j)] == 0)
            masses.push_back(view.key_score(g, j));
    rest.mass = log_sum(masses);
    return rest;
}

void store_estimate(const DecodeParams& p, int64_t row, const std::vector<Term>& attended,
                    double rest) {
    if (p.omitted_mass_estimate == nullptr) return;
    std::vector<double> scores;
    for (const Term& term : attended) scores.push_back(term.score);
    p.omitted_mass_estimate[row] =
        static_cast<float>(rest == kMinusInfinity ? 0 : 1 / (1 + std::exp(log_sum(scores) - rest)));
}

// Softmax over the terms and the head's sink, then the weighted values.
void store_row(const DecodeParams& p, const QueryView& view, int64_t b, int64_t i, int g,
               const std::vector<Term>& terms) {
    const double sink = p.sinks != nullptr && view.span.visible > 0
                            ? static_cast<double>(p.sinks[view.head(g)])
                            : kMinusInfinity;
    double max = sink;
    for (const Term& term : terms)
        if (term.score > max || term.score != term.score) max = term.score;
    const bool empty = max == kMinusInfinity;
    double sum = empty ? 0 : std::exp(sink - max);
    std::vector<double> out(static_cast<size_t>(p.head_dim), 0);
    for (const Term& term : terms) {
        if (empty) break;
        const double weight = std::exp(term.score - max);
        sum += weight;
        for (int64_t d = 0; d < p.head_dim; ++d)
            out[static_cast<size_t>(d)] += weight * (term.is_pool ? view.pool_value(term.index, d)
                                                                  : view.value(term.index, d));
    }
    const int64_t offset =
        b * p.out_stride_batch + view.head(g) * p.out_stride_head + i * p.out_stride_seq;
    for (int64_t d = 0; d < p.head_dim; ++d)
        store_number(p.dtype, p.out, offset + d,
                     static_cast<float>(empty ? 0 : out[static_cast<size_t>(d)] / sum));
    if (p.lse != nullptr)
        p.lse[view.row(g)] = static_cast<float>(empty ? max : max + std::log(sum));
}

void attend(const DecodeParams& p, const QueryView& view, int64_t b, int64_t i,
            const Selection& selection, bool condenses) {
    for (int g = 0; g < p.group(); ++g) {
        std::vector<Term> terms;
        for (int64_t j = 0; j < view.span.visible; ++j)
            if (view.is_there(j) &&
                (view.is_attended_anyway(j) || selection.listed[static_cast<size_t>(j)]))
                terms.push_back({view.key_score(g, j), j, false});
        const Rest rest = condenses ? rest_of(view, g, selection) : Rest{};
        store_estimate(p, view.row(g), terms, rest.mass);
        if (p.far_field) terms.insert(terms.end(), rest.pools.begin(), rest.pools.end());
        store_row(p, view, b, i, g, terms);
    }
}

void run_query(const DecodeParams& p, const CachedSequence& sequence, int64_t b, int64_t kv,
               int64_t i, uint32_t* errors) {
    const QueryView view(p, sequence, b, kv, i);
    Selection selection;
    const bool dense = p.mode == DecodeMode::kDense || (p.mode == DecodeMode::kSelectAndAttend &&
                                                        attends_densely(view.span, p.shortlist));
    if (p.mode == DecodeMode::kGivenTokens) {
        selection.listed = given_tokens(p, view, errors);
    } else if (dense) {
        selection.listed.assign(static_cast<size_t>(view.span.visible), 1);
    } else {
        selection.shortlisted = shortlist_units(p, view);
        selection.listed = list_tokens(p, view, selection.shortlisted);
        store_list(p, view, selection.listed);
    }
    const bool condenses = p.mode == DecodeMode::kSelectAndAttend && !dense;
    if (p.mode != DecodeMode::kSelect) attend(p, view, b, i, selection, condenses);
}

}  // namespace

void attention_with_kvcache(const DecodeParams& p, uint32_t* errors) {
    for (int64_t b = 0; b < p.batch; ++b) {
        const CachedSequence sequence(p.cache, b, errors);
        for (int64_t kv = 0; kv < p.kv_heads; ++kv)
            for (int64_t i = 0; i < p.query_len; ++i) run_query(p, sequence, b, kv, i, errors);
    }
}

}  // namespace condensate::reference
