// Checks of the decoding stages' parameters, in validate.h's order and manner.
#pragma once

#include "condensate/decode.h"

namespace condensate {

Status validate(const DecodeParams& params);
Status validate(const UpdateSummariesParams& params);

}  // namespace condensate
