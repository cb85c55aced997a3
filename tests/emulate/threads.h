// What the scheduler of fibers (threads.cc) tells the checks of memory (memory.cc).
#pragma once

#include <string>

#include "emulate.h"

namespace emulate {

struct Thread {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    uint32_t block = 0, index = 0;  // of the grid, of the CTA
    uint32_t launch = 0;
    uint32_t cluster_size = 1;
    uint32_t block_epoch = 0, cluster_epoch = 0, warp_epoch = 0;  // barriers behind it
    bool fenced = false;
    Site site = {nullptr, 0};  // of the barrier that it waits at
    struct Copy {
        uint32_t dst;
        const void* src;
        bool copies;
        int group;
    };
    std::vector<Copy> copies;
    int copy_group = 0;
};
constexpr size_t kStackBytes = 96 * 1024;

extern Thread* current;  // null on the host

// Says once for each place in the code what was found.
void report(const std::string& what, const void* place);
void report(const std::string& what, Site site);

// Shared memory of as many CTAs as run at a time: all garbage; then the one that is in smem_bytes.
void start_shared_memory(uint32_t ctas, size_t bytes);
void swap_shared_memory(uint32_t cta);
// May a CTA of the cluster have ended, so that its shared memory is gone?
bool has_ended(uint32_t cta);

}  // namespace emulate
