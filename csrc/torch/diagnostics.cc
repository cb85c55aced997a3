// What calls leave behind lives beside the kernels, in this library, so it is read through it: C
// functions that python/condensate_ext/diagnostics.py calls. No operators: a compiled graph must
// not contain them.
#include <algorithm>
#include <cstring>
#include <string>

#include "condensate/condensate.h"
#include "host/dispatch.h"
#include "torch/tensor_args.h"

namespace {

void copy_text(const std::string& text, char* out, int64_t out_bytes) {
    if (out_bytes <= 0) return;
    const size_t size = std::min(text.size(), static_cast<size_t>(out_bytes) - 1);
    std::memcpy(out, text.data(), size);
    out[size] = '\0';
}

}  // namespace

#define CONDENSATE_EXPORT extern "C" __attribute__((visibility("default")))

// Returns a StatusCode; `message` receives the text of one that is not kOk. Device -1 is the CPU.
CONDENSATE_EXPORT int32_t condensate_read_error_word(int32_t device_index, int32_t clear,
                                                     uint32_t* word, char* message,
                                                     int64_t message_bytes) {
    using namespace condensate;
    Executor executor;
    Status status;
    if (device_index >= 0) status = ops::make_cuda_executor(device_index, &executor);
    if (status.ok()) status = read_error_word(executor, clear != 0, word);
    copy_text(status.message, message, message_bytes);
    return static_cast<int32_t>(status.code);
}

// The plan that this thread's last stage followed.
CONDENSATE_EXPORT void condensate_last_plan(char* text, int64_t text_bytes) {
    copy_text(condensate::to_string(condensate::last_plan()), text, text_bytes);
}
