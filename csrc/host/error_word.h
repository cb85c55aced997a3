// The sticky error word (ErrorBit): one per CUDA device, one for all CPU calls of the process.
#pragma once

#include <cstdint>

#include "condensate/types.h"

namespace condensate {

void set_cpu_error(uint32_t bits);
uint32_t read_cpu_error(bool clear);

// What strict mode reports; ok for a word of 0.
Status status_of_error_word(const char* op, uint32_t word);

#if defined(CONDENSATE_WITH_CUDA)
// Address of the current device's word in device memory.
Status cuda_error_word(uint32_t** address);
// Synchronises `stream`, reads the word of the current device and clears it if asked.
Status read_cuda_error(void* stream, bool clear, uint32_t* word);
// Is the stream recording a CUDA graph, so that it must not be synchronised?
bool is_capturing(void* stream);
#endif

}  // namespace condensate
