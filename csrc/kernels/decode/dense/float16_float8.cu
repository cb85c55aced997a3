#include "kernels/decode/dense/by_type.h"
#include "kernels/decode/dense/types.h"

namespace condensate::kernels::decode {

template Status decode_dense_float8<__half>(const DecodeParams&, const LaunchContext&);

}  // namespace condensate::kernels::decode
