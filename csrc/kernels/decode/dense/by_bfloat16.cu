#include "kernels/decode/dense/by_type.h"

namespace condensate::kernels::decode {

template Status attend_splits<__nv_bfloat16>(const DecodeParams&, const Partials&,
                                             const LaunchContext&);

}  // namespace condensate::kernels::decode
