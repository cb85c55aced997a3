#include "host/error_word.h"

#include <atomic>

#include "condensate/condensate.h"
#include "host/device_info.h"
#include "host/status.h"

namespace condensate {
namespace {
std::atomic<uint32_t> g_cpu_word{0};
}

void set_cpu_error(uint32_t bits) {
    if (bits != 0) g_cpu_word.fetch_or(bits, std::memory_order_relaxed);
}

uint32_t read_cpu_error(bool clear) {
    return clear ? g_cpu_word.exchange(0, std::memory_order_relaxed)
                 : g_cpu_word.load(std::memory_order_relaxed);
}

Status status_of_error_word(const char* op, uint32_t word) {
    if (word == 0) return {};
    return make_status(
        StatusCode::kInvalidArgument,
        "%s: invalid tensor contents (error word 0x%x):%s%s%s%s%s%s the entries were skipped; fix "
        "them, "
        "or unset CONDENSATE_STRICT to keep skipping.",
        op, word,
        word & kErrorBlockIndex
            ? " block_indices has an entry that is negative, past the last block or not ascending;"
            : "",
        word & kErrorBlockCount
            ? " block_counts has a value outside 0..block_indices.size(-1), or token_counts one "
              "outside 0..token_indices.size(-1);"
            : "",
        word & kErrorRowIndex ? " rows has an entry outside 0..query_len-1;" : "",
        word & kErrorCacheLength ? " cache_seqlens has a length below 0 or beyond the pages;" : "",
        word & kErrorBlockTable ? " block_table has an entry below 0 or past the last page;" : "",
        word & kErrorTokenIndex ? " token_indices has an entry that is negative, not visible to "
                                  "its query or not ascending;"
                                : "");
}

Status read_error_word(const Executor& executor, bool clear, uint32_t* word) {
    if (word == nullptr)
        return make_status(StatusCode::kInvalidArgument,
                           "read_error_word: word is null, expected a pointer to a uint32_t; pass "
                           "the address of one.");
    if (!executor.cuda) {
        *word = read_cpu_error(clear);
        return {};
    }
#if defined(CONDENSATE_WITH_CUDA)
    DeviceGuard guard(executor.device_index);
    if (!guard.status().ok()) return guard.status();
    return read_cuda_error(executor.stream, clear, word);
#else
    DeviceFacts facts;
    return cuda_device_facts(executor.device_index, &facts);  // says what to install
#endif
}

}  // namespace condensate
