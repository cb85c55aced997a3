#include "kernels/block_select/sm80/by_mma.h"

namespace condensate::kernels::block_select {

template Status by_mma<__half>(const Call& call);

}  // namespace condensate::kernels::block_select
