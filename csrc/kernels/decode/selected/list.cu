// The keys to attend, from the scores of all slots: a CTA an item.
#include "device/softmax.h"
#include "kernels/decode/selected/launch.h"
#include "kernels/decode/selected/select.h"
#include "kernels/decode/selected/sums.h"

namespace condensate::kernels::decode {
namespace {

constexpr int kListThreads = 1024;
constexpr int kListWarps = kListThreads / 32;

struct ListSmem {
    SelectSmem<kListThreads> select;
    float normaliser[kMaxDecodeGroup];
    float selectable[kMaxDecodeGroup];
    float reference[kMaxDecodeGroup];
    float warp_sums[kListWarps][4];
};
static_assert(kListWarps == 32, "a lane a warp adds their sums up");

// Behind it.
struct SlotArrays {
    float* ranks;   // [slots]
    int32_t* keys;  // [slots]
};

// What ranks and weights are taken against, from the sums of all slices: a warp a head.
__device__ void normalise_keys(ListSmem& smem, const DecodeParams& params, const Item& item,
                               const Record& record, int slices) {
    const int lane = static_cast<int>(threadIdx.x) % 32, group = params.group();
    for (int h = static_cast<int>(threadIdx.x) / 32; h < group; h += kListWarps) {
        const ScoreSums total = merge_all(&record.slot_sums[h], group, slices);
        if (lane != 0) continue;
        smem.normaliser[h] = total.sum > 0.0f ? total.largest + log2f(total.sum) : 0.0f;
        smem.selectable[h] = total.selectable;
        // Units weigh, too, where they were scanned.
        float reference = item.selects ? fmaxf(total.largest, __ldcg(&record.header->unit_max[h]))
                                       : total.largest;
        if (params.sinks)
            reference = fmaxf(reference, params.sinks[item.kv_head * group + h] * device::kLog2E);
        smem.reference[h] = record.header->reference[h] = device::finite_reference(reference);
    }
    __syncthreads();
}

// A slot's rank in shared memory stands for what becomes of its key, too.
constexpr float kAttendedRank = INFINITY;  // whatever is selected
__device__ __forceinline__ float absent_rank() { return __int_as_float(0x7fffffff); }

// Keys and ranks of all slots to shared memory. Loads go out in batches: one after the other their
// latencies would add up.
__device__ void rank_slots(const ListSmem& smem, SlotArrays arrays, const Item& item,
                           const Record& record, int slots, int group) {
    constexpr int kBatch = 5;
    const int thread = static_cast<int>(threadIdx.x);
    for (int first = thread; first < slots; first += kBatch * kListThreads) {
        int32_t key[kBatch];
        float rank[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int i = first + b * kListThreads;
            key[b] = i < slots ? __ldcg(&record.slot_keys[i]) : -1;
            rank[b] = -INFINITY;
        }
        for (int h = 0; h < group; h += 4) {
            float score[kBatch][4];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int i = min(first + b * kListThreads, slots - 1);
                if (group % 4 == 0) {
                    const float4 four =
                        __ldcg(reinterpret_cast<const float4*>(&record.key_scores[i * group + h]));
                    score[b][0] = four.x, score[b][1] = four.y;
                    score[b][2] = four.z, score[b][3] = four.w;
                } else {
#pragma unroll
                    for (int e = 0; e < 4; ++e)
                        score[b][e] = __ldcg(&record.key_scores[i * group + min(h + e, group - 1)]);
                }
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b)
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    rank[b] = fmaxf(rank[b], score[b][e] - smem.normaliser[min(h + e, group - 1)]);
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int i = first + b * kListThreads;
            if (i >= slots) continue;
            arrays.keys[i] = key[b];
            const bool ranked = item.selects && item.span.is_candidate(key[b]);
            arrays.ranks[i] = key[b] < 0 ? absent_rank()
                              : ranked   ? fminf(rank[b], 1.0f)
                                         : kAttendedRank;
        }
    }
    __syncthreads();
}

// The mass of scored keys that are not attended, four heads at a time.
template <class Unlisted>
__device__ void tell_unlisted(ListSmem& smem, const Record& record, int slots, int group,
                              Unlisted&& unlisted) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int h = 0; h < group; h += 4) {
        float sum[4] = {};
        for (int i = static_cast<int>(threadIdx.x); i < slots; i += kListThreads) {
            if (!unlisted(i)) continue;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int head = min(h + e, group - 1);
                sum[e] += ptx::exp2_approx(__ldcg(&record.key_scores[i * group + head]) -
                                           smem.reference[head]);
            }
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                sum[e] += __shfl_xor_sync(0xffffffffu, sum[e], offset);
            if (lane == 0) smem.warp_sums[warp][e] = sum[e];
        }
        __syncthreads();
        if (warp < 4) {
            float total = smem.warp_sums[lane][warp];
#pragma unroll
            for (int offset = 16; offset > 0; offset /= 2)
                total += __shfl_xor_sync(0xffffffffu, total, offset);
            if (lane == 0 && h + warp < group) record.header->unlisted[h + warp] = total;
        }
        __syncthreads();
    }
}

// Lists the keys to attend, or, where that is all that is asked for, the selected tokens.
__device__ void list_rows(ListSmem& smem, SlotArrays arrays, const DecodeParams& params,
                          const Item& item, const Record& record, int slots, int slices,
                          int64_t index) {
    const int group = params.group();
    normalise_keys(smem, params, item, record, slices);
    rank_slots(smem, arrays, item, record, slots, group);
    const RankedItems items{arrays.ranks, slots, 0};
    Selection selection = {0, 0, 0};
    if (item.selects) {
        const bool by_mass = params.top_p > 0.0f;
        const End end{
            static_cast<uint32_t>(min_i64(params.topk, INT32_MAX)), by_mass,
            by_mass ? static_cast<unsigned long long>((1.0f - fminf(params.top_p, 1.0f)) * 0x1p30f)
                    : 0ull};
        selection = select_largest(Group{1}, smem.select, items,
                                   top_rank(smem.selectable, smem.normaliser, group), end);
    }
    const auto is_listed = [&](int i) { return items.reaches(i, selection.threshold); };
    if (params.mode == DecodeMode::kSelect) {
        int32_t* tokens = params.token_indices + index * params.topk;
        compact(smem.select, slots, is_listed,
                [&](int i, uint32_t place) { tokens[place] = arrays.keys[i]; });
        for (int64_t i = selection.count + threadIdx.x; i < params.topk; i += kListThreads)
            tokens[i] = -1;
        if (threadIdx.x == 0) params.token_counts[index] = static_cast<int32_t>(selection.count);
        return;
    }
    if (params.omitted_mass_estimate)
        tell_unlisted(smem, record, slots, group,
                      [&](int i) { return RankedItems::is_item(items.ranks[i]) && !is_listed(i); });
    const uint32_t rows = compact(
        smem.select, slots, [&](int i) { return items.ranks[i] == kAttendedRank || is_listed(i); },
        [&](int i, uint32_t place) { record.rows[place] = {arrays.keys[i], i}; });
    if (threadIdx.x == 0) record.header->rows = static_cast<int32_t>(rows);
}

__global__ void __launch_bounds__(kListThreads)
    decode_list_kernel(const __grid_constant__ DecodeParams params,
                       const __grid_constant__ Sizes sizes, uint8_t* workspace,
                       uint32_t* error_word) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<ListSmem*>(smem_bytes);
    auto* ranks = reinterpret_cast<float*>(smem_bytes + aligned(sizeof(ListSmem)));
    const SlotArrays arrays{ranks, reinterpret_cast<int32_t*>(ranks + sizes.slots)};
    const Item item(params, blockIdx.x, error_word);
    const Record record(workspace, sizes, blockIdx.x);
    const int32_t listed =
        params.mode == DecodeMode::kGivenTokens
            ? static_cast<int32_t>(ceil_div(
                  max_i64(min_i64(params.token_counts[blockIdx.x], params.topk), 0), kUnitKeys))
            : __ldcg(&record.header->units);
    const int slots = SlotRuns(item.span, listed).slots();
    list_rows(smem, arrays, params, item, record, slots, (slots + kSliceSlots - 1) / kSliceSlots,
              blockIdx.x);
}

}  // namespace

Status list_rows(const DecodeParams& p, const Sizes& sizes, const LaunchContext& context) {
    Grid grid{p.batch * p.kv_heads * p.query_len};
    return launch(decode_list_kernel, "decode_list", grid, kListThreads,
                  aligned(sizeof(ListSmem)) + sizes.slots * int64_t{8}, context, p, sizes,
                  static_cast<uint8_t*>(p.workspace), context.error_word);
}

int64_t selected_workspace_bytes(const DecodeParams& p) {
    return sizes_of(p).record_bytes * p.batch * p.kv_heads * p.query_len;
}

}  // namespace condensate::kernels::decode
