// The scan: scores of all units for all rows, in exact integer products.
#include <limits>

#include "cpu/decode.h"
#include "cpu/parallel.h"

namespace condensate::cpu {
namespace {

constexpr int64_t kUnitsPerItem = 16 * kTileKeys;

struct ScanScratch {
    QueryTile queries;       // rounded
    float* row;              // [dim]
    float* units;            // [kTileKeys][dim]
    float* scores;           // [kTileKeys][kScoreStride]
    float scale[kMaxRows];   // of the rounded queries
    float center[kMaxRows];  // query · key_center
};

struct ScanItem {
    int64_t b, kv, first_row, rows;  // rows of the group's queries: query * group + head
    int64_t first_unit, end_unit;
};

void load_queries(const DecodeCall& call, const ScanItem& item, ScanScratch& s) {
    const float* center = call.p.summaries.key_center;
    s.queries.clear(item.rows);
    for (int r = 0; r < item.rows; ++r) {
        const int64_t row = item.first_row + r;
        call.load_query(item.b, item.kv, row / call.group, static_cast<int>(row % call.group),
                        s.row);
        double product = 0;
        if (center != nullptr)
            for (int d = 0; d < call.dim; ++d)
                product += static_cast<double>(s.row[d]) * center[item.kv * call.dim + d];
        s.center[r] = static_cast<float>(product);
        s.scale[r] = round_row(s.row, call.dim);
        s.queries.put(s.row, r);
    }
}

// Units [first, first + count) -> floats and their scales; NaN where their page is missing.
void load_units(const DecodeCall& call, const ScanItem& item, int64_t first, int count, float* rows,
                float* scales, bool* there) {
    const KvSummaries& s = call.p.summaries;
    const SequenceRows sequence = call.rows_of(item.b, item.kv);
    const int64_t per_page = unit_rows(call.p.cache.page_size);
    int run = 0;
    for (int n = 0; n < count; n += run) {
        const int64_t key = (first + n) * kUnitKeys;
        const int64_t page = sequence.page_of(key), row = sequence.slot_of(key) / kUnitKeys;
        run = static_cast<int>(min_i64(count - n, per_page - row));
        std::fill(there + n, there + n + run, page >= 0);
        if (page < 0) {
            std::fill(rows + int64_t{n} * call.dim, rows + int64_t{n + run} * call.dim, 0.0f);
            continue;
        }
        call.ops.load_int8_rows(
            s.rows + page * s.rows_stride_page + item.kv * s.rows_stride_head + row * call.dim,
            call.dim, run, call.dim, rows + int64_t{n} * call.dim, call.dim);
        const float* from =
            s.scales + page * s.scales_stride_page + item.kv * s.scales_stride_head + row;
        std::copy(from, from + run, scales + n);
    }
}

void scan_tile(const DecodeCall& call, const ScanItem& item, int64_t first, ScanScratch& s) {
    const int count = static_cast<int>(min_i64(kTileKeys, item.end_unit - first));
    float scales[kTileKeys];
    bool there[kTileKeys];
    load_units(call, item, first, count, s.units, scales, there);
    s.queries.score(call.ops, s.units, item.rows, 1.0f, s.scores);
    const DecodeParams& p = call.p;
    for (int r = 0; r < item.rows; ++r) {
        const int64_t row = item.first_row + r;
        float* target = call.scores_of_units(call.row(item.b, item.kv, row / call.group,
                                                      static_cast<int>(row % call.group))) +
                        first;
        for (int n = 0; n < count; ++n) {
            const float product = s.scores[n * kScoreStride + r] * (s.scale[r] * scales[n]);
            target[n] = there[n] ? p.scale * (product + s.center[r])
                                 : -std::numeric_limits<float>::infinity();
        }
        if (p.softcap > 0)
            for (int n = 0; n < count; ++n) target[n] = capped(target[n], p.softcap);
    }
}

}  // namespace

Status scan_units(DecodeCall& call) {
    const DecodeParams& p = call.p;
    const int64_t rows = p.query_len * call.group, row_tiles = ceil_div(rows, kMaxRows);
    const int64_t pieces = max_i64(ceil_div(call.longest / kUnitKeys, kUnitsPerItem), 1);
    auto layout = [&](Arena& arena) {
        return ScanScratch{{arena.take<float>(int64_t{kMaxRows} * call.dim), call.group, call.dim},
                           arena.take<float>(call.dim),
                           arena.take<float>(int64_t{kTileKeys} * call.dim),
                           arena.take<float>(int64_t{kTileKeys} * kScoreStride),
                           {},
                           {}};
    };
    return for_each_item(call.executor, p.batch * p.kv_heads * row_tiles * pieces, layout,
                         [&](int64_t n, ScanScratch& scratch) {
                             ScanItem item;
                             item.first_unit = n % pieces * kUnitsPerItem;
                             n /= pieces;
                             item.first_row = n % row_tiles * kMaxRows;
                             item.rows = min_i64(rows - item.first_row, kMaxRows);
                             n /= row_tiles;
                             item.kv = n % p.kv_heads;
                             item.b = n / p.kv_heads;
                             // The last query sees most.
                             const int64_t last = (item.first_row + item.rows - 1) / call.group;
                             const int64_t units = call.span(item.b, last).units;
                             item.end_unit = min_i64(item.first_unit + kUnitsPerItem, units);
                             if (item.first_unit >= item.end_unit || !call.scans(item.b, last))
                                 return;
                             load_queries(call, item, scratch);
                             for (int64_t unit = item.first_unit; unit < item.end_unit;
                                  unit += kTileKeys)
                                 scan_tile(call, item, unit, scratch);
                         });
}

}  // namespace condensate::cpu
