#include "kernels/decode/selected/launch.h"

namespace condensate::kernels::decode {

CONDENSATE_DECODE_SELECTED(__half, __half)

}  // namespace condensate::kernels::decode
