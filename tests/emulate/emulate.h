// Runs kernels' device code on the host, one fiber a CUDA thread, and watches every access to
// memory. Kernels are compiled as C++ against shim/ with -fsanitize=thread, whose calls
// (__tsan_read4 and so on) are answered here. It finds what a run on a GPU may not show: accesses
// out of bounds or misaligned, two threads that touch the same bytes without a barrier between,
// reads through L1 of what another CTA wrote, and barriers that not all threads reach. Threads take
// turns in random order; what they make of memory that nothing wrote shows by other garbage in it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace emulate {

struct Site {  // of a barrier or a warp's operation in the source
    const char* file;
    int line;
    bool operator==(const Site& other) const { return file == other.file && line == other.line; }
};

struct LaunchShape {
    uint32_t grid[3];
    uint32_t threads;
    uint32_t smem_bytes;
    uint32_t cluster;  // CTAs that run at the same time
};
void run_grid(const LaunchShape& shape, void (*kernel)(const void*), const void* arguments);

// The order in which threads and CTAs run.
void set_order(uint32_t seed);
// What was found since the last call; each place in the code once.
std::vector<std::string> take_reports();

// What shared memory holds before a kernel writes it.
void set_garbage(int byte);

// Device memory: from here on accesses of kernels to these bytes are in bounds.
void add_memory(const void* base, size_t bytes, const char* name, bool read_only);
void remove_memory(const void* base);
// cudaMemset2D.
void fill_rows(void* base, size_t pitch, int value, size_t width, size_t height);
// A kernel's dynamic shared memory, `extern __shared__ smem_bytes[]`.
struct SharedMemory {
    explicit SharedMemory(void* base);  // kSharedBytes of it
};
constexpr size_t kSharedBytes = 228 * 1024;

enum class Access : uint8_t { kRead, kReadPastL1, kReadConstant, kWrite, kAtomic };
// A checked copy between a thread and memory.
void load(void* dst, const void* src, size_t bytes, size_t alignment, Access how);
// The same of another CTA of the cluster, at the place of `mine` in its shared memory.
void load_peer(void* dst, const void* mine, size_t bytes, uint32_t rank);
void store(void* dst, const void* src, size_t bytes, size_t alignment);

// `kernel` of all threads in the CTA, or the cluster.
void sync_block(Site site);
void sync_cluster(Site site);
void sync_warp(uint32_t mask, Site site);
// Every lane's `bytes` to all[32].
void exchange(uint32_t mask, const void* mine, size_t bytes, void* all, Site site);
void fence();

enum class Op { kAdd, kMin, kMax, kOr };
uint64_t atomic(void* address, uint64_t operand, size_t bytes, bool is_signed, Op op);

uint32_t smem_offset(const void* pointer);
void* smem_pointer(uint32_t offset);
// Of the copies that the thread began: whole groups, the last `pending` ones stay on their way.
void begin_copy(uint32_t dst_smem, const void* src, bool copies);
void commit_copies();
void wait_for_copies(int pending);

}  // namespace emulate
