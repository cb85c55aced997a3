// The omitted-mass audit on CUDA cores.
#include "device/simt/key_sweep.h"
#include "kernels/launch.h"
#include "kernels/omitted_mass/common/omitted.h"
#include "kernels/token_select/common/sweep_check.h"

namespace condensate::kernels {
namespace simt {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    omitted_mass_simt_kernel(const __grid_constant__ OmittedMassParams params,
                             uint32_t* error_word) {
    extern __shared__ __align__(16) uint8_t smem_bytes[];
    auto& smem = *reinterpret_cast<SweepSmem*>(smem_bytes);
    const Problem& problem = params.problem;
    RowGroup cta = row_group_of_cta<kCtaRows>(problem, params.num_rows);
    fill_row_table(smem.rows, cta, problem, [&](int64_t slot) {
        if (params.rows == nullptr) return slot;
        int64_t query = params.rows[slot];
        return query >= 0 && query < cta.query_len ? query : int64_t{-1};
    });
    load_queries<T>(smem, cta, params.query, static_cast<int>(problem.head_dim));

    Lane lane;
    int32_t visible_end[kWarpRows];
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) visible_end[r] = smem.rows.visible_end[lane.row(r)];
    LaneSum sums[kWarpRows];
    sweep_keys<T>(smem, cta, params.key, problem, 0, smem.rows.last_visible_end,
                  [&](const float (&score)[kWarpRows], int32_t key) {
#pragma unroll
                      for (int r = 0; r < kWarpRows; ++r) {
                          if (key < visible_end[r]) sums[r].add(score[r]);
                      }
                  });
#pragma unroll
    for (int r = 0; r < kWarpRows; ++r) {
        int row = lane.row(r);
        float lse_full = sums[r].over_warp().lse();
        if (lane.lane != 0 || !cta.exists(row)) continue;
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
}

}  // namespace
}  // namespace simt

Status omitted_mass_simt(const OmittedMassParams& params, const LaunchContext& context) {
    Status status = check_key_count("omitted_mass_simt", params.problem);
    if (!status.ok()) return status;
    return with_element_type(params.problem.dtype, [&](auto tag) {
        return launch(simt::omitted_mass_simt_kernel<typename decltype(tag)::type>,
                      "omitted_mass_simt",
                      {row_groups<simt::kCtaRows>(params.problem, params.num_rows)}, simt::kThreads,
                      sizeof(simt::SweepSmem), context, params, context.error_word);
    });
}

}  // namespace condensate::kernels
