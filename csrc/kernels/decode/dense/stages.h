// The two launches of dense decoding.
#pragma once

#include "condensate/decode.h"
#include "kernels/decode/dense/splits.h"
#include "kernels/launchers.h"

namespace condensate::kernels::decode {

// Attention within every split of keys; Element of the cache, one instantiation a file.
template <class Element>
Status attend_splits(const DecodeParams& params, const Partials& partials,
                     const LaunchContext& context);
// Adds the splits up.
Status combine_splits(const DecodeParams& params, const Partials& partials,
                      const LaunchContext& context);

}  // namespace condensate::kernels::decode
