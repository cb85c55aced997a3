// Exact audit: the full LSE of every asked row by a pass over all visible keys (mma.sync).
#include "device/element.h"
#include "kernels/launch.h"
#include "kernels/omitted_mass/common/omitted.h"
#include "kernels/token_select/common/sweep_check.h"
#include "kernels/token_select/sm80/sweep_lse.h"

namespace condensate::kernels {
namespace {

template <int kDim>
struct alignas(128) OmittedMassSmem {
    uint8_t stages[SweepShape<kDim>::kStages * SweepShape<kDim>::kStageBytes];
    SweepRows rows;
    LsePart parts[kSweepRows][kSweepWarpsN];
};

template <class T, int kDim>
__global__ void __launch_bounds__(kSweepThreads, 2)
    omitted_mass_sm80_kernel(OmittedMassParams params, uint32_t* error_word) {
    extern __shared__ __align__(128) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<OmittedMassSmem<kDim>*>(smem_bytes);
    uint32_t stages_smem = ptx::smem_address(smem.stages);
    const Problem& problem = params.problem;
    RowGroup cta = row_group_of_cta<kSweepRows>(problem, params.num_rows);

    fill_row_table(smem.rows, cta, problem, [&](int64_t slot) {
        if (params.rows == nullptr) return slot;
        int64_t query = params.rows[slot];
        return query >= 0 && query < cta.query_len ? query : int64_t{-1};
    });
    SweepQueries<kDim> queries;
    load_sweep_queries<T, kDim>(queries, stages_smem, smem.rows, cta, params.query,
                                static_cast<int>(problem.head_dim));

    SweepLane lane;
    int32_t visible_end[kSweepMTiles][2];
#pragma unroll
    for (int m = 0; m < kSweepMTiles; ++m) {
        visible_end[m][0] = smem.rows.visible_end[lane.row(m, 0)];
        visible_end[m][1] = smem.rows.visible_end[lane.row(m, 1)];
    }
    device::OnlineSoftmax<kSweepMTiles> softmax;
    SweepKeys<T> keys(params.key, cta, problem);
    sweep_keys<T, kDim>(queries, stages_smem, keys, 0, smem.rows.last_visible_end,
                        [&](SweepScores<kDim>& scores, int32_t first_key) {
                            add_to_lse(softmax, scores, problem.scale, visible_end, first_key);
                        });
    float lse_full = finish_lse(softmax, smem.parts);

    int row = static_cast<int>(threadIdx.x);
    if (row >= kSweepRows || !cta.exists(row)) return;
    int64_t query = smem.rows.query[row];
    float omitted = NAN;
    if (query >= 0) {
        omitted = omitted_from_lse(params.lse[cta.flat_row(problem, row, query)], lse_full);
    } else {
        atomicOr(error_word, kErrorRowIndex);
    }
    int64_t head = cta.batch * problem.query_heads + cta.head(row);
    params.omitted[head * params.num_rows + cta.slot(row)] = omitted;
}

template <class T, int kDim>
Status launch_omitted_mass(const OmittedMassParams& params, const LaunchContext& context) {
    return launch(omitted_mass_sm80_kernel<T, kDim>, "omitted_mass_sm80",
                  {row_groups<kSweepRows>(params.problem, params.num_rows)}, kSweepThreads,
                  sizeof(OmittedMassSmem<kDim>), context, params, context.error_word);
}

}  // namespace

Status omitted_mass_sm80(const OmittedMassParams& params, const LaunchContext& context) {
    Status status = check_sweep("omitted_mass_sm80", params.problem, params.query, params.key);
    if (!status.ok()) return status;
    return with_sweep_shape(params.problem, [&](auto type, auto dim) {
        return launch_omitted_mass<typename decltype(type)::type, decltype(dim)::value>(params,
                                                                                        context);
    });
}

}  // namespace condensate::kernels
