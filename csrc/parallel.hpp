// Loops that are divided among threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace usf {

// Hands out the indices [0, count) to any thread that asks, and keeps the first failure.
class SharedWork {
public:
    explicit SharedWork(std::int64_t count) : count_(count) {}

    // Calls task(i) for indices that no other thread has got, until none is left. Does not throw.
    template <class Task>
    void help(Task&& task) {
        try {
            for (std::int64_t i; (i = next_.fetch_add(1)) < count_;) task(i);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (!failure_) failure_ = std::current_exception();
            next_ = count_;
        }
    }
    // Call it after all threads have returned.
    void rethrow() const {
        if (failure_) std::rethrow_exception(failure_);
    }

private:
    const std::int64_t count_;
    std::atomic<std::int64_t> next_{0};
    std::exception_ptr failure_;
    std::mutex mutex_;
};

// Number of threads, out of `threads`, that have work with `count` tasks; at least 1, even without any task.
inline int workers_for(std::int64_t count, int threads) {
    return static_cast<int>(std::clamp<std::int64_t>(count, 1, std::max(threads, 1)));
}

// Calls task(worker, i) once for every i in [0, count). `worker` in [0, workers_for(count, threads)) names
// the scratch space that the call may use. Which worker runs which i is not fixed, so results must not depend
// on it.
template <class Task>
void parallel_for(std::int64_t count, int threads, Task&& task) {
    const int workers = workers_for(count, threads);
    if (workers <= 1) {
        for (std::int64_t i = 0; i < count; ++i) task(0, i);
        return;
    }
    SharedWork work(count);
    const auto run = [&](int worker) { work.help([&](std::int64_t i) { task(worker, i); }); };
    std::vector<std::thread> pool;
    pool.reserve(workers - 1);
    try {
        for (int worker = 1; worker < workers; ++worker) pool.emplace_back(run, worker);
    } catch (const std::exception&) {  // the system has no more threads: those started do the work
    }
    run(0);
    for (std::thread& thread : pool) thread.join();
    work.rethrow();
}

// Calls body(i) for every i in [0, count), a stretch of neighbours at a time.
template <class Index, class Body>
void for_each(Index count, int threads, Body&& body) {
    constexpr Index stretch = 1 << 16;
    parallel_for((static_cast<std::int64_t>(count) + stretch - 1) / stretch, threads,
                 [&](int, std::int64_t s) {
                     const Index begin = static_cast<Index>(s) * stretch,
                                 end = std::min<Index>(count - begin, stretch) + begin;
                     for (Index i = begin; i < end; ++i) body(i);
                 });
}

}  // namespace usf
