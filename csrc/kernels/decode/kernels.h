// What decoding is made of: attention over every key, and over those that are selected or given.
#pragma once

#include "condensate/decode.h"
#include "kernels/launchers.h"

namespace condensate::kernels::decode {

int64_t dense_workspace_bytes(const DecodeParams& params);
Status run_dense(const DecodeParams& params, const LaunchContext& context);

int64_t selected_workspace_bytes(const DecodeParams& params);
// One instantiation a file.
template <class T, class CacheT>
Status run_selected(const DecodeParams& params, const LaunchContext& context);

}  // namespace condensate::kernels::decode
