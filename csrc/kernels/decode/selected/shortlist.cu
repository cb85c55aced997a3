// The units to look into: those of highest rank.
#include "device/softmax.h"
#include "kernels/decode/selected/launch.h"
#include "kernels/decode/selected/select.h"
#include "kernels/decode/selected/sums.h"

namespace condensate::kernels::decode {
namespace {

constexpr int kShortlistThreads = 1024;

struct ShortlistSmem {
    SelectSmem<kShortlistThreads> select;
    float normaliser[kMaxDecodeGroup];  // log2 of the sum that ranks are taken against
    float selectable[kMaxDecodeGroup];
    // then: float ranks[units of a CTA]
};

// From the sums of the scan's chunks: a warp a head.
__device__ inline void normalise_units(ShortlistSmem& smem, const Record& record,
                                       const Sizes& sizes, const Item& item, bool first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int chunks = (item.span.units + kChunkUnits - 1) / kChunkUnits;
    for (int h = static_cast<int>(threadIdx.x) / 32; h < sizes.group; h += kShortlistThreads / 32) {
        const ScoreSums total = merge_all(&record.chunk_sums[h * sizes.chunks], 1, chunks);
        if (lane != 0) continue;
        smem.normaliser[h] = total.sum > 0.0f ? total.largest + log2f(total.sum * kUnitKeys) : 0.0f;
        smem.selectable[h] = total.selectable;
        if (first) record.header->unit_max[h] = total.largest;
    }
    __syncthreads();
}

// Ranks to shared memory. Loads go out in batches: one after the other their latencies would add
// up.
__device__ void rank_units(const ShortlistSmem& smem, float* ranks, const Record& record, int first,
                           int units, int heads) {
    constexpr int kBatch = 4;
    for (int begin = static_cast<int>(threadIdx.x); begin < units;
         begin += kBatch * kShortlistThreads) {
        float rank[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) rank[b] = -INFINITY;
        for (int h = 0; h < heads; h += 4) {
            float4 score[kBatch];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int i = min(begin + b * kShortlistThreads, units - 1);
                const float* scores =
                    record.unit_scores + static_cast<int64_t>(first + i) * heads + h;
                if (heads % 4 == 0)
                    score[b] = __ldcg(reinterpret_cast<const float4*>(scores));
                else
                    score[b] = {__ldcg(scores), __ldcg(scores + min(1, heads - 1 - h)),
                                __ldcg(scores + min(2, heads - 1 - h)),
                                __ldcg(scores + min(3, heads - 1 - h))};
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const float* normaliser = smem.normaliser + h;
                const int more = heads - 1 - h;
                rank[b] = fmaxf(fmaxf(fmaxf(rank[b], score[b].x - normaliser[0]),
                                      score[b].y - normaliser[min(1, more)]),
                                fmaxf(score[b].z - normaliser[min(2, more)],
                                      score[b].w - normaliser[min(3, more)]));
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
            if (begin + b * kShortlistThreads < units)
                ranks[begin + b * kShortlistThreads] = rank[b];
    }
}

// A group an item: a fixed share of the candidate units a CTA.
__global__ void __launch_bounds__(kShortlistThreads)
    decode_shortlist_kernel(const __grid_constant__ DecodeParams params,
                            const __grid_constant__ Sizes sizes, int group_size, uint8_t* workspace,
                            uint32_t* error_word) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<ShortlistSmem*>(smem_bytes);
    auto* ranks = reinterpret_cast<float*>(smem_bytes + aligned(sizeof(ShortlistSmem)));
    const Group group{ptx::kHasClusters ? group_size : 1};
    const Item item(params, group.index(), error_word);
    const Record record(workspace, sizes, group.index());
    const int heads = sizes.group, rank = group.rank();
    if (!item.selects) {
        if (threadIdx.x == 0 && rank == 0) {
            record.header->units =
                item.span.candidates() > 0 ? item.span.end_unit() - item.span.first_unit() : 0;
            for (int h = 0; h < heads; ++h) record.header->unit_max[h] = -INFINITY;
        }
        return;
    }
    const int candidates = item.span.end_unit() - item.span.first_unit();
    const int each = (candidates + group.size - 1) / group.size;
    const int first = item.span.first_unit() + min(rank * each, candidates);
    const int units = min(each, item.span.end_unit() - first);
    normalise_units(smem, record, sizes, item, rank == 0);
    rank_units(smem, ranks, record, first, units, heads);
    __syncthreads();
    const RankedItems items{ranks, units, static_cast<uint32_t>(first)};
    const Selection selection =
        select_largest(group, smem.select, items, top_rank(smem.selectable, smem.normaliser, heads),
                       End{static_cast<uint32_t>(params.shortlist / kUnitKeys), false, 0});
    compact(
        smem.select, units, [&](int i) { return items.reaches(i, selection.threshold); },
        [&](int i, uint32_t place) {
            record.shortlist[selection.before + place] = first + i;
            // Its keys are scored one by one: as a unit it weighs nothing.
            for (int h = 0; h < heads; ++h)
                record.unit_scores[static_cast<int64_t>(first + i) * heads + h] = -INFINITY;
        });
    if (threadIdx.x == 0 && rank == 0) record.header->units = static_cast<int32_t>(selection.count);
    group.end();
}

// CTAs that make a shortlist: more where there are few items, or many units.
int shortlist_ctas(const DecodeParams& p, const Sizes& sizes, const LaunchContext& context) {
    const int64_t items = p.batch * p.kv_heads * p.query_len;
    constexpr int kUnitsOfOne = 8192;
    if (context.sm_major < 9 || sizes.units() <= kUnitsOfOne) return 1;
    return items * kMaxGroupCtas <= 2 * context.sm_count || sizes.units() > 4 * kUnitsOfOne
               ? kMaxGroupCtas
               : 2;
}

}  // namespace

Status make_shortlists(const DecodeParams& p, const Sizes& sizes, const LaunchContext& context) {
    const int ctas = shortlist_ctas(p, sizes, context);
    Grid grid{p.batch * p.kv_heads * p.query_len * ctas};
    grid.cluster = ctas;
    const int64_t smem_bytes =
        aligned(sizeof(ShortlistSmem)) + ceil_div(sizes.units() + ctas, ctas) * 4;
    return launch(decode_shortlist_kernel, "decode_shortlist", grid, kShortlistThreads, smem_bytes,
                  context, p, sizes, ctas, static_cast<uint8_t*>(p.workspace), context.error_word);
}

}  // namespace condensate::kernels::decode
