#pragma once

#include <cstddef>
#include <memory>

namespace usf {

// Uninitialised storage that only grows. Memory that is reserved and never written costs address space, not
// pages, so callers reserve the most that they may need.
template <class T>
class Buffer {
public:
    T* reserve(std::size_t n) {
        if (n > capacity_) {
            free();  // first: the old contents are not wanted
            data_.reset(new T[n]);
            capacity_ = n;
        }
        return data_.get();
    }
    void free() { release().reset(); }
    std::unique_ptr<T[]> release() {
        capacity_ = 0;
        return std::move(data_);
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](std::size_t i) { return data_[i]; }
    const T& operator[](std::size_t i) const { return data_[i]; }

private:
    std::unique_ptr<T[]> data_;
    std::size_t capacity_ = 0;
};

}  // namespace usf
