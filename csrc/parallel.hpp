// A loop over threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace usf {

// Calls task(worker, i) once for every i in [0, count). `worker` in [0, threads) names the scratch space that
// the call may use. Which worker runs which i is not fixed, so a task must not let it show in its result.
template <class Task>
void parallel_for(std::int64_t count, int threads, Task&& task) {
    const int workers = static_cast<int>(std::min<std::int64_t>(std::max(threads, 1), count));
    if (workers <= 1) {
        for (std::int64_t i = 0; i < count; ++i) task(0, i);
        return;
    }
    std::atomic<std::int64_t> next{0};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    const auto run = [&](int worker) {
        try {
            for (std::int64_t i; (i = next.fetch_add(1)) < count;) task(worker, i);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(failure_mutex);
            if (!failure) failure = std::current_exception();
            next = count;
        }
    };
    std::vector<std::thread> pool;
    for (int worker = 1; worker < workers; ++worker) pool.emplace_back(run, worker);
    run(0);
    for (std::thread& thread : pool) thread.join();
    if (failure) std::rethrow_exception(failure);
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
