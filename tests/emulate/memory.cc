// Every access to memory of emulated threads: bounds, alignment, what was written, and races.
#include <cuda_runtime.h>

#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <set>

#include "threads.h"

extern "C" char __executable_start, end;  // of the program's code and static data

namespace emulate {
namespace {

struct Touch {  // one access to a byte
    uint32_t launch = 0, block = 0, thread = 0;
    uint32_t block_epoch = 0, cluster_epoch = 0, warp_epoch = 0;
    Access how = Access::kRead;
    const void* place = nullptr;
    bool is_write() const { return how == Access::kWrite || how == Access::kAtomic; }
};
struct Byte {
    Touch write;     // the last
    Touch reads[2];  // the last, of two threads
};

struct Region {
    size_t bytes;
    std::string name;
    std::vector<Byte> shadow;
};
struct SharedState {
    std::vector<Byte> shadow;
    std::vector<char> content;  // of all arenas, while another CTA of the cluster runs
};

std::map<const char*, Region, std::greater<>> g_regions;
std::vector<char*>& arenas() {  // smem_bytes of every kernel; filled in before main()
    static std::vector<char*> all;
    return all;
}
std::vector<SharedState> g_shared;                 // by CTA of a cluster
constexpr size_t kArenaStride = 2 * kSharedBytes;  // of addresses in 32 bits

SharedState* g_in = nullptr;
int g_garbage = 0xff;
size_t g_shared_bytes = 0;
// Blocks whose atomics on an address, after a fence, this block's atomics have followed.
struct Published {
    uint32_t launch = 0;
    std::set<uint32_t> blocks;
};
std::map<const void*, Published> g_published;
std::map<uint32_t, std::set<uint32_t>> g_followed;
uint32_t g_followed_launch = 0;

std::string place_of(const void* place) {
    char text[32];
    std::snprintf(text, sizeof(text), " (%p)", place);
    return text;
}
std::string in_block(const std::string& what, const void* place) { return what + place_of(place); }

// Of one launch: does `before` happen before what `now` does?
bool is_ordered(const Touch& before, const Thread& now) {
    if (before.block == now.block) {
        return before.thread == now.index || before.block_epoch < now.block_epoch ||
               (before.thread / 32 == now.index / 32 && before.warp_epoch < now.warp_epoch);
    }
    if (before.block / now.cluster_size == now.block / now.cluster_size &&
        before.cluster_epoch < now.cluster_epoch)
        return true;
    const auto followed = g_followed.find(now.block);
    return followed != g_followed.end() && followed->second.count(before.block) > 0;
}

void touch_byte(Byte& byte, Access how, const char* name, const void* place, bool is_shared) {
    const Thread& now = *current;
    const bool writes = how == Access::kWrite || how == Access::kAtomic;
    const bool atomic = how == Access::kAtomic;
    auto conflicts = [&](const Touch& other) {
        if (is_shared && other.block / now.cluster_size != now.block / now.cluster_size)
            return false;  // an earlier CTA's
        return other.launch == now.launch && (writes || other.is_write()) &&
               !(atomic && other.how == Access::kAtomic) && !is_ordered(other, now);
    };
    for (const Touch* other : {&byte.write, &byte.reads[0], &byte.reads[1]})
        if (conflicts(*other) && (writes || other == &byte.write))
            report(in_block(std::string(name) +
                                ": two threads without a barrier between, the other at" +
                                place_of(other->place),
                            place),
                   place);
    if (!is_shared && byte.write.launch == now.launch && byte.write.how != Access::kRead) {
        if (how == Access::kReadConstant)
            report(in_block(std::string(name) + ": __ldg of what this kernel writes", place),
                   place);
        if (how == Access::kRead && byte.write.block != now.block)
            report(in_block(std::string(name) + ": a read through L1 of what another CTA wrote",
                            place),
                   place);
    }
    const Touch touch = {now.launch,        now.block,      now.index, now.block_epoch,
                         now.cluster_epoch, now.warp_epoch, how,       place};
    if (writes) {
        byte.write = touch;
    } else {
        if (byte.reads[0].launch != now.launch || byte.reads[0].thread != now.index ||
            byte.reads[0].block != now.block)
            byte.reads[1] = byte.reads[0];
        byte.reads[0] = touch;
    }
}

// The shadow of an address's bytes; null where they need none.
void touch(const void* address, size_t bytes, Access how, const void* place) {
    if (current == nullptr) return;
    auto* p = static_cast<const char*>(address);
    if (p >= current->stack && p < current->stack + kStackBytes) return;
    for (const char* arena : arenas()) {
        if (p < arena || p >= arena + kSharedBytes) continue;
        const size_t offset = static_cast<size_t>(p - arena);
        if (offset + bytes > g_shared_bytes)
            return report(in_block("shared memory: out of bounds", place), place);
        for (size_t i = 0; i < bytes; ++i)
            touch_byte(g_in->shadow[offset + i], how, "shared memory", place, true);
        return;
    }
    if (p >= &__executable_start && p < &end) return;
    const auto region = g_regions.lower_bound(p);
    if (region == g_regions.end() || p + bytes > region->first + region->second.bytes)
        return report(in_block("an access out of bounds", place), place);
    const size_t offset = static_cast<size_t>(p - region->first);
    if (region->second.shadow.empty()) {
        if (how == Access::kWrite || how == Access::kAtomic)
            report(in_block(region->second.name + ": a write of an input", place), place);
        return;
    }
    for (size_t i = 0; i < bytes; ++i)
        touch_byte(region->second.shadow[offset + i], how, region->second.name.c_str(), place,
                   false);
}

void check_alignment(const void* address, size_t alignment, const void* place) {
    if (current == nullptr || reinterpret_cast<uintptr_t>(address) % alignment == 0) return;
    report(in_block("an access that is not aligned", place), place);
}

}  // namespace

SharedMemory::SharedMemory(void* base) { arenas().push_back(static_cast<char*>(base)); }

void set_garbage(int byte) { g_garbage = byte; }

void start_shared_memory(uint32_t ctas, size_t bytes) {
    if (g_shared.size() < ctas) g_shared.resize(ctas);
    for (SharedState& state : g_shared) {
        if (state.shadow.size() < bytes) state.shadow.resize(bytes);
        if (ctas > 1) state.content.assign(bytes * arenas().size(), static_cast<char>(g_garbage));
    }
    for (char* arena : arenas()) std::memset(arena, g_garbage, bytes);
    g_shared_bytes = bytes;
    g_in = &g_shared[0];
}
void swap_shared_memory(uint32_t cta) {
    SharedState* next = &g_shared[cta];
    if (next == g_in) return;
    for (size_t i = 0; i < arenas().size(); ++i) {
        std::memcpy(g_in->content.data() + i * g_shared_bytes, arenas()[i], g_shared_bytes);
        std::memcpy(arenas()[i], next->content.data() + i * g_shared_bytes, g_shared_bytes);
    }
    g_in = next;
}

void add_memory(const void* base, size_t bytes, const char* name, bool read_only) {
    g_regions[static_cast<const char*>(base)] = {bytes, name,
                                                 std::vector<Byte>(read_only ? 0 : bytes)};
}
void remove_memory(const void* base) { g_regions.erase(static_cast<const char*>(base)); }

void fill_rows(void* base, size_t pitch, int value, size_t width, size_t height) {
    for (size_t row = 0; row < height; ++row) {
        auto* begin = static_cast<char*>(base) + row * pitch;
        std::memset(begin, value, width);
        const auto region = g_regions.lower_bound(begin);
        if (region == g_regions.end() || begin + width > region->first + region->second.bytes) {
            report("a memset out of bounds", nullptr);
            continue;
        }
    }
}

void load(void* dst, const void* src, size_t bytes, size_t alignment, Access how) {
    const void* place = __builtin_return_address(0);
    check_alignment(src, alignment, place);
    touch(src, bytes, how, place);
    std::memcpy(dst, src, bytes);
}
void load_peer(void* dst, const void* mine, size_t bytes, uint32_t rank) {
    const void* place = __builtin_return_address(0);
    if (has_ended(rank)) report(in_block("a read of a CTA that may have ended", place), place);
    for (size_t i = 0; i < arenas().size(); ++i) {
        const auto offset = static_cast<size_t>(static_cast<const char*>(mine) - arenas()[i]);
        if (static_cast<const char*>(mine) < arenas()[i] || offset >= kSharedBytes) continue;
        if (offset + bytes > g_shared_bytes)
            return report(in_block("shared memory: out of bounds", place), place);
        SharedState& peer = g_shared[rank];
        for (size_t b = 0; b < bytes; ++b)
            touch_byte(peer.shadow[offset + b], Access::kReadPastL1, "a peer's shared memory",
                       place, true);
        std::memcpy(dst, &peer == g_in ? mine : peer.content.data() + i * g_shared_bytes + offset,
                    bytes);
    }
}
void store(void* dst, const void* src, size_t bytes, size_t alignment) {
    const void* place = __builtin_return_address(0);
    check_alignment(dst, alignment, place);
    touch(dst, bytes, Access::kWrite, place);
    std::memcpy(dst, src, bytes);
}

void fence() { current->fenced = true; }

uint64_t atomic(void* address, uint64_t operand, size_t bytes, bool is_signed, Op op) {
    const void* place = __builtin_return_address(0);
    check_alignment(address, bytes, place);
    touch(address, bytes, Access::kAtomic, place);
    if (g_followed_launch != current->launch) {
        g_followed.clear();
        g_published.clear();
        g_followed_launch = current->launch;
    }
    Published& published = g_published[address];
    g_followed[current->block].insert(published.blocks.begin(), published.blocks.end());
    if (current->fenced) published.blocks.insert(current->block);
    uint64_t old = 0;
    std::memcpy(&old, address, bytes);
    auto less = [&](uint64_t a, uint64_t b) {
        return is_signed ? static_cast<int32_t>(a) < static_cast<int32_t>(b) : a < b;
    };
    uint64_t x = old;
    if (bytes == 4) operand &= 0xffffffffu;
    if (op == Op::kAdd) x = old + operand;
    if (op == Op::kOr) x = old | operand;
    if (op == Op::kMin) x = less(operand, old) ? operand : old;
    if (op == Op::kMax) x = less(old, operand) ? operand : old;
    std::memcpy(address, &x, bytes);
    return old;
}

uint32_t smem_offset(const void* pointer) {
    auto* p = static_cast<const char*>(pointer);
    for (size_t i = 0; i < arenas().size(); ++i)
        if (p >= arenas()[i] && p < arenas()[i] + kSharedBytes)
            return static_cast<uint32_t>(i * kArenaStride + static_cast<size_t>(p - arenas()[i]));
    report("the address of what is not in shared memory", __builtin_return_address(0));
    return 0;
}
void* smem_pointer(uint32_t offset) {
    return arenas()[offset / kArenaStride] + offset % kArenaStride;
}

void begin_copy(uint32_t dst_smem, const void* src, bool copies) {
    if (copies) check_alignment(src, 16, __builtin_return_address(0));
    check_alignment(smem_pointer(dst_smem), 16, __builtin_return_address(0));
    current->copies.push_back({dst_smem, src, copies, current->copy_group});
}
void commit_copies() { ++current->copy_group; }
// As late as they may be, copies land here.
void wait_for_copies(int pending) {
    const void* place = __builtin_return_address(0);
    std::vector<Thread::Copy> left;
    for (const Thread::Copy& copy : current->copies) {
        if (copy.group >= current->copy_group - pending) {
            left.push_back(copy);
            continue;
        }
        char bytes[16] = {};
        if (copy.copies) {
            touch(copy.src, 16, Access::kReadPastL1, place);
            std::memcpy(bytes, copy.src, 16);
        }
        touch(smem_pointer(copy.dst), 16, Access::kWrite, place);
        std::memcpy(smem_pointer(copy.dst), bytes, 16);
    }
    current->copies = left;
}

}  // namespace emulate

// What -fsanitize=thread calls before every access to memory.
using emulate::Access;
#define EMULATE_HOOKS(bytes)                                                   \
    extern "C" void __tsan_read##bytes(void* p) {                              \
        emulate::check_alignment(p, bytes, __builtin_return_address(0));       \
        emulate::touch(p, bytes, Access::kRead, __builtin_return_address(0));  \
    }                                                                          \
    extern "C" void __tsan_write##bytes(void* p) {                             \
        emulate::check_alignment(p, bytes, __builtin_return_address(0));       \
        emulate::touch(p, bytes, Access::kWrite, __builtin_return_address(0)); \
    }                                                                          \
    extern "C" void __tsan_unaligned_read##bytes(void* p) {                    \
        emulate::touch(p, bytes, Access::kRead, __builtin_return_address(0));  \
    }                                                                          \
    extern "C" void __tsan_unaligned_write##bytes(void* p) {                   \
        emulate::touch(p, bytes, Access::kWrite, __builtin_return_address(0)); \
    }
EMULATE_HOOKS(1)
EMULATE_HOOKS(2)
EMULATE_HOOKS(4)
EMULATE_HOOKS(8)
EMULATE_HOOKS(16)
extern "C" void __tsan_read_range(void* p, size_t bytes) {
    emulate::touch(p, bytes, Access::kRead, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
    emulate::touch(p, bytes, Access::kWrite, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
