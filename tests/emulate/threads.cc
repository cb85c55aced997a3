// Fibers, barriers and the operations of warps.
#include "threads.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <utility>

#include <sys/mman.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Saves the callee-saved registers and the stack pointer, and takes up those of another fiber.
#if !defined(__x86_64__)
#error "tests/emulate switches stacks with x86-64 instructions"
#endif
extern "C" void emulate_switch(void** from, void* to);
asm(R"(
.globl emulate_switch
emulate_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

namespace emulate {

Thread* current = nullptr;

namespace {

constexpr uint32_t kLanes = 32;
constexpr size_t kLaneBytes = 64;

struct Warp {
    uint32_t arrived = 0, exited = 0, mask = 0;
    Site site = {nullptr, 0};
    int turn = 0;
    char lanes[2][kLanes][kLaneBytes];
};

struct Block {
    uint32_t index = 0;
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    std::vector<uint32_t> ready;
    uint32_t live = 0, waiting = 0, waiting_for_cluster = 0;
    Site site = {nullptr, 0};
};

std::mt19937 g_random(1);
std::vector<std::string> g_reports;
std::set<std::pair<const void*, std::string>> g_seen;
std::vector<char*> g_stacks;
uint32_t g_launch = 0;
void* g_scheduler = nullptr;
void (*g_kernel)(const void*) = nullptr;
const void* g_arguments = nullptr;
std::vector<std::unique_ptr<Block>>* g_cluster = nullptr;
Block* g_block = nullptr;

std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

void yield() { emulate_switch(&current->stack_pointer, g_scheduler); }

void wait_at(Site site) {
    current->site = site;
    yield();
}

void finish() {
    Block& block = *g_block;
    Warp& warp = block.warps[current->index / kLanes];
    warp.exited |= 1u << current->index % kLanes;
    if (warp.arrived & warp.mask)
        report("a lane has left the kernel while others wait at " + text(warp.site), warp.site);
    if (block.waiting || block.waiting_for_cluster)
        report("a thread has left the kernel while others wait at " + text(block.site), block.site);
    if (!current->copies.empty())
        report("a thread has left the kernel with copies on their way", Site{"kernel", 0});
    --block.live;
    yield();
    std::abort();
}

extern "C" void emulate_start() {
    g_kernel(g_arguments);
    finish();
}

void make_thread(Thread& thread, char* stack) {
    thread.stack = stack;
    auto** top = reinterpret_cast<void**>(stack + kStackBytes) - 4;
    top[0] = reinterpret_cast<void*>(emulate_start);  // the stack is 8 from 16 where it begins
    thread.stack_pointer = top - 6;
}

char* stack_of(size_t number) {
    while (g_stacks.size() <= number)
        g_stacks.push_back(static_cast<char*>(mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                                                   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
    return g_stacks[number];
}

void wake(Block& block, uint32_t thread) { block.ready.push_back(thread); }

// Runs a CTA's threads until all of them wait or have ended.
void run_ready(Block& block, const LaunchShape& shape) {
    g_block = &block;
    blockIdx = {block.index % shape.grid[0], block.index / shape.grid[0] % shape.grid[1],
                block.index / shape.grid[0] / shape.grid[1]};
    while (!block.ready.empty()) {
        std::swap(block.ready[g_random() % block.ready.size()], block.ready.back());
        const uint32_t index = block.ready.back();
        block.ready.pop_back();
        current = &block.threads[index];
        threadIdx = {index, 0, 0};
        emulate_switch(&g_scheduler, current->stack_pointer);
        current = nullptr;
    }
}

std::unique_ptr<Block> make_block(const LaunchShape& shape, uint32_t index, size_t first_stack) {
    auto block = std::make_unique<Block>();
    block->index = index;
    block->live = shape.threads;
    block->threads.resize(shape.threads);
    block->warps.resize((shape.threads + kLanes - 1) / kLanes);
    for (uint32_t t = 0; t < shape.threads; ++t) {
        Thread& thread = block->threads[t];
        make_thread(thread, stack_of(first_stack + t));
        thread.block = index;
        thread.index = t;
        thread.launch = g_launch;
        thread.cluster_size = shape.cluster;
        wake(*block, t);
    }
    return block;
}

void run_cluster(const LaunchShape& shape, uint32_t cluster) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (uint32_t b = 0; b < shape.cluster; ++b)
        blocks.push_back(make_block(shape, cluster * shape.cluster + b, size_t{b} * shape.threads));
    g_cluster = &blocks;
    start_shared_memory(shape.cluster, shape.smem_bytes);
    while (true) {
        std::vector<Block*> runnable;
        uint32_t live = 0;
        for (auto& block : blocks) {
            live += block->live;
            if (!block->ready.empty()) runnable.push_back(block.get());
        }
        if (runnable.empty()) {
            for (auto& block : blocks)
                for (uint32_t t = 0; live > 0 && t < block->threads.size(); ++t)
                    if (block->threads[t].site.file)
                        report("threads wait forever, some at " + text(block->threads[t].site),
                               block->threads[t].site);
            break;
        }
        Block& block = *runnable[g_random() % runnable.size()];
        swap_shared_memory(block.index % shape.cluster);
        run_ready(block, shape);
    }
}

}  // namespace

void report(const std::string& what, const void* place) {
    if (g_seen.emplace(place, what).second) g_reports.push_back(what);
}
void report(const std::string& what, Site) { report(what, static_cast<const void*>(nullptr)); }

bool has_ended(uint32_t cta) {
    const Block& block = *(*g_cluster)[cta];
    return block.live < block.threads.size();
}

std::vector<std::string> take_reports() {
    g_seen.clear();
    return std::exchange(g_reports, {});
}

void set_order(uint32_t seed) { g_random.seed(seed); }

void run_grid(const LaunchShape& shape, void (*kernel)(const void*), const void* arguments) {
    ++g_launch;
    g_kernel = kernel;
    g_arguments = arguments;
    blockDim = dim3(shape.threads);
    gridDim = dim3(shape.grid[0], shape.grid[1], shape.grid[2]);
    std::vector<uint32_t> clusters(shape.grid[0] * shape.grid[1] * shape.grid[2] / shape.cluster);
    for (uint32_t i = 0; i < clusters.size(); ++i) clusters[i] = i;
    std::shuffle(clusters.begin(), clusters.end(), g_random);
    for (const uint32_t cluster : clusters) run_cluster(shape, cluster);
}

void sync_block(Site site) {
    Block& block = *g_block;
    if (block.waiting > 0 && !(block.site == site))
        report("__syncthreads of one CTA: " + text(block.site) + " and " + text(site), site);
    block.site = site;
    if (++block.waiting < block.live) return wait_at(site);
    block.waiting = 0;
    for (Thread& thread : block.threads) {
        ++thread.block_epoch;
        if (&thread != current && thread.site.file) wake(block, thread.index);
        thread.site.file = nullptr;
    }
}

void sync_cluster(Site site) {
    Block& mine = *g_block;
    mine.site = site;
    ++mine.waiting_for_cluster;
    uint32_t waiting = 0, live = 0;
    for (auto& block : *g_cluster) {
        waiting += block->waiting_for_cluster;
        live += block->live;
    }
    if (waiting < live) return wait_at(site);
    for (auto& block : *g_cluster) {
        block->waiting_for_cluster = 0;
        for (Thread& thread : block->threads) {
            ++thread.block_epoch;
            ++thread.cluster_epoch;
            if (&thread != current && thread.site.file) wake(*block, thread.index);
            thread.site.file = nullptr;
        }
    }
}

namespace {

// True in the lane that arrives last, which goes on; the others have waited.
int meet(uint32_t mask, Site site) {
    Warp& warp = g_block->warps[current->index / kLanes];
    const uint32_t lane = current->index % kLanes, turn = static_cast<uint32_t>(warp.turn);
    if (warp.arrived != 0 && (!(warp.site == site) || warp.mask != mask))
        report("lanes of one warp are at " + text(warp.site) + " and " + text(site), site);
    if (warp.exited & mask) report("a lane that has left is waited for at " + text(site), site);
    warp.site = site;
    warp.mask = mask;
    warp.arrived |= 1u << lane;
    if ((warp.arrived & mask) != (mask & ~warp.exited)) {
        wait_at(site);
        return static_cast<int>(turn);
    }
    warp.arrived = 0;
    warp.turn ^= 1;
    const uint32_t first = current->index / kLanes * kLanes;
    for (uint32_t i = 0; i < kLanes; ++i) {
        if (!(mask >> i & 1) || i == lane || first + i >= g_block->threads.size()) continue;
        Thread& thread = g_block->threads[first + i];
        if (thread.site.file) wake(*g_block, first + i);
        thread.site.file = nullptr;
    }
    return static_cast<int>(turn);
}

}  // namespace

void sync_warp(uint32_t mask, Site site) {
    meet(mask, site);
    ++current->warp_epoch;
}

void exchange(uint32_t mask, const void* mine, size_t bytes, void* all, Site site) {
    if (bytes > kLaneBytes) std::abort();
    const uint32_t number = current->index / kLanes;
    Warp& warp = g_block->warps[number];
    std::memcpy(warp.lanes[warp.turn][current->index % kLanes], mine, bytes);
    const int turn = meet(mask, site);
    for (uint32_t i = 0; i < kLanes; ++i)
        std::memcpy(static_cast<char*>(all) + i * bytes, warp.lanes[turn][i], bytes);
}

}  // namespace emulate

// Of the CUDA runtime, what launches of kernels call.
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t) { return "emulated"; }
const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
cudaError_t cudaMemset2DAsync(void* base, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t) {
    emulate::fill_rows(base, pitch, value, width, height);
    return cudaSuccess;
}
