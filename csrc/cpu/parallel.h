// Runs independent work items over the caller's threads, each worker with its own scratch memory.
#pragma once

#include <atomic>
#include <cstddef>
#include <new>

#include "condensate/types.h"
#include "host/status.h"

namespace condensate::cpu {

// Hands out aligned arrays from one block of memory; without a block it only measures.
class Arena {
  public:
    static constexpr size_t kAlignment = 64;
    explicit Arena(std::byte* base) : base_(base) {}

    template <class T>
    T* take(int64_t count) {
        size_t at = used_;
        size_t bytes = static_cast<size_t>(count) * sizeof(T);
        used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
        return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
    }
    size_t used() const { return used_; }

  private:
    std::byte* base_;
    size_t used_ = 0;
};

// Calls body(item, scratch) for every item in [0, items), in any order and on any threads.
// `layout` builds the scratch of a worker from an Arena. Items must not depend on each other.
template <class Layout, class Body>
Status for_each_item(const Executor& executor, int64_t items, const Layout& layout,
                     const Body& body) {
    struct Job {
        const Layout& layout;
        const Body& body;
        size_t bytes;
        std::atomic<bool> out_of_memory{false};

        static void run(void* self, int64_t begin, int64_t end) {
            Job& job = *static_cast<Job*>(self);
            constexpr std::align_val_t alignment{Arena::kAlignment};
            void* memory = ::operator new(job.bytes, alignment, std::nothrow);
            if (memory == nullptr) {
                job.out_of_memory.store(true, std::memory_order_relaxed);
                return;
            }
            Arena arena(static_cast<std::byte*>(memory));
            auto scratch = job.layout(arena);
            for (int64_t item = begin; item < end; ++item) job.body(item, scratch);
            ::operator delete(memory, alignment);
        }
    };
    Arena measure(nullptr);
    layout(measure);
    Job job{layout, body, measure.used() + Arena::kAlignment};
    if (executor.parallel_for != nullptr)
        executor.parallel_for(items, &Job::run, &job);
    else if (items > 0)
        Job::run(&job, 0, items);
    if (!job.out_of_memory.load(std::memory_order_relaxed)) return {};
    return make_status(StatusCode::kUnsupported,
                       "the host cannot allocate %zu bytes of scratch memory per thread; use "
                       "fewer threads or shorter sequences.",
                       job.bytes);
}

}  // namespace condensate::cpu
