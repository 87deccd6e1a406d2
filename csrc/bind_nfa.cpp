#include <algorithm>
#include <span>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "nfa.hpp"
#include "parallel.hpp"

namespace usf {

// Shapes, dtypes and values are checked by the caller, in Python.
template <class T>
using Energies = nb::ndarray<const T, nb::ndim<3>, nb::c_contig, nb::device::cpu>;  // (B, H, W)
using Counts = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Nodes = nb::ndarray<const std::int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Runs the test on every map, then finish(test, b), with one workspace per thread. If there are fewer images
// than threads, the trees are built by several threads each.
template <class T, class Finish>
void test_batch(const Energies<T>& energy, const Tail& tail, std::span<const double> size_counts, int threads,
                Finish finish) {
    const std::int64_t batch = energy.shape(0), height = energy.shape(1), width = energy.shape(2);
    const int outer = workers_for(batch, threads);
    std::vector<RegionTest<T>> workspaces(outer);
    parallel_for(batch, outer, [&](int worker, std::int64_t b) {
        RegionTest<T>& test = workspaces[worker];
        test.run(energy.data() + b * height * width, height, width, tail, size_counts, threads / outer);
        finish(test, b);
    });
}

template <class T>
nb::ndarray<nb::numpy, float> log_nfa_maps(Energies<T> energy, const Tail& tail, Counts size_counts,
                                           double offset, double ceiling, int threads) {
    const std::size_t batch = energy.shape(0), height = energy.shape(1), width = energy.shape(2);
    Memory<float> maps = allocate<float>(batch * height * width);
    {
        nb::gil_scoped_release unlocked;
        test_batch<T>(energy, tail, {size_counts.data(), size_counts.shape(0)}, threads,
                      [&](RegionTest<T>& test, std::int64_t b) {
                          test.write_map(offset, ceiling, maps.get() + b * height * width);
                      });
    }
    return to_numpy(std::move(maps), {batch, height, width});
}

// Returns a list of (top, left, bottom, right, area, level, log_nfa, row, column) for each image.
template <class T>
nb::list find_regions(Energies<T> energy, const Tail& tail, Counts size_counts, double offset,
                      double log_epsilon, int threads) {
    std::vector<std::vector<Region>> found(energy.shape(0));
    {
        nb::gil_scoped_release unlocked;
        test_batch<T>(
            energy, tail, {size_counts.data(), size_counts.shape(0)}, threads,
            [&](RegionTest<T>& test, std::int64_t b) { found[b] = test.regions(offset, log_epsilon); });
    }
    nb::list images;
    for (const std::vector<Region>& regions : found) {
        nb::list image;
        for (const Region& r : regions) {
            image.append(nb::make_tuple(r.top, r.left, r.bottom, r.right, r.area, r.level, r.log_nfa, r.row,
                                        r.column));
        }
        images.append(image);
    }
    return images;
}

nb::ndarray<nb::numpy, double> log_tail(const Tail& tail, Counts levels) {
    const std::size_t n = levels.shape(0);
    Memory<double> out = allocate<double>(n);
    std::transform(levels.data(), levels.data() + n, out.get(), [&](double t) { return tail(t); });
    return to_numpy(std::move(out), {n});
}

// Throws unless 0 <= value[i] < end(i) for all i: users can make a ComponentTree of any arrays.
template <class End>
void check_nodes(const char* name, const std::int32_t* value, std::size_t n, End end) {
    std::uint32_t outside = 0;  // the sign bit is set if any is outside: loops over it vectorise everywhere
    for (std::size_t i = 0; i < n; ++i) {
        const auto v = static_cast<std::uint32_t>(value[i]);
        outside |= v | (end(i) - 1 - v);
    }
    if (outside >> 31 == 0) return;
    std::size_t i = 0;
    while (static_cast<std::uint32_t>(value[i]) < end(i)) ++i;
    throw nb::value_error((std::string(name) + ": expected nodes below " + std::to_string(end(i)) +
                           ", found " + std::to_string(value[i]))
                              .c_str());
}

nb::ndarray<nb::numpy, std::int32_t> areas(Indices parent, Nodes node) {
    const std::size_t n = parent.shape(0);
    Memory<std::int32_t> area = allocate<std::int32_t>(n);
    {
        nb::gil_scoped_release unlocked;
        check_nodes("parent", parent.data(), n, [](std::size_t i) { return std::uint32_t(i + (i == 0)); });
        check_nodes("node", node.data(), node.size(), [n](std::size_t) { return std::uint32_t(n); });
        node_areas(parent.data(), n, node.data(), node.size(), area.get());
    }
    return to_numpy(std::move(area), {n});
}

void bind_nfa(nb::module_& m) {
    using namespace nb::literals;
    nb::class_<Tail>(m, "Tail")
        .def(
            "__init__",
            [](Tail* self, double dof, double scale, bool exact) {
                new (self) Tail(dof, scale, exact ? TailKind::exact : TailKind::chernoff);
            },
            "dof"_a, "scale"_a, "exact"_a)
        .def("__call__", &log_tail, "levels"_a.noconvert());
    m.def("log_upper_gamma", &log_upper_gamma, "a"_a, "ratio"_a);
    m.def("node_areas", &areas, "parent"_a.noconvert(), "node"_a.noconvert());
    const auto per_type = [&]<class T>(T) {
        m.def("log_nfa_maps", &log_nfa_maps<T>, "energy"_a.noconvert(), "tail"_a, "size_counts"_a.noconvert(),
              "offset"_a, "ceiling"_a, "threads"_a);
        m.def("find_regions", &find_regions<T>, "energy"_a.noconvert(), "tail"_a, "size_counts"_a.noconvert(),
              "offset"_a, "log_epsilon"_a, "threads"_a);
    };
    per_type(float{});
    per_type(double{});
}

}  // namespace usf
