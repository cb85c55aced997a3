#include "kernels/decode/selected/launch.h"

namespace condensate::kernels::decode {

CONDENSATE_DECODE_SELECTED(__nv_bfloat16, __nv_bfloat16)

}  // namespace condensate::kernels::decode
