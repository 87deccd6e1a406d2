// The component tree: one map drawn by hand, then many against a plain sort and union-find.
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.hpp"
#include "max_tree.hpp"

using namespace usf;

namespace component_tree_test {

void expect(bool condition, const char* what, std::int64_t height, std::int64_t width) {
    if (condition) return;
    std::printf("FAILED: %s, %lld x %lld\n", what, static_cast<long long>(height),
                static_cast<long long>(width));
    ++failures;
}

template <class T>
ComponentTree<T> build(const std::vector<T>& image, std::int64_t height, std::int64_t width,
                       Connectivity connectivity, int threads) {
    ComponentTree<T> tree;
    MaxTreeBuilder<T>().build(image.data(), height, width, connectivity, threads, tree);
    return tree;
}

// For each pixel a pixel of the same component, the same for all of them, and one of the next larger
// component.
struct Plain {
    std::vector<std::int32_t> component, parent;
};

template <class T>
Plain plain_tree(const std::vector<T>& image, std::int64_t height, std::int64_t width,
                 Connectivity connectivity) {
    const auto n = static_cast<std::int32_t>(image.size());
    std::vector<std::int32_t> order(n), set(n, -1), parent(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return image[a] > image[b]; });
    for (const std::int32_t p : order) {
        set[p] = parent[p] = p;
        for (std::int64_t y = p / width - 1; y <= p / width + 1; ++y)
            for (std::int64_t x = p % width - 1; x <= p % width + 1; ++x) {
                if (y < 0 || y >= height || x < 0 || x >= width) continue;
                if (connectivity == Connectivity::four && y != p / width && x != p % width) continue;
                auto q = static_cast<std::int32_t>(y * width + x);
                if (set[q] < 0) continue;
                while (set[q] != q) q = set[q] = set[set[q]];
                if (q != p) set[q] = parent[q] = p;
            }
    }
    Plain tree{std::vector<std::int32_t>(n), parent};
    for (auto p = order.rbegin(); p != order.rend(); ++p) {
        std::int32_t& q = tree.parent[*p];
        if (image[tree.parent[q]] == image[q]) q = tree.parent[q];
        tree.component[*p] = image[q] == image[*p] ? q : *p;
    }
    return tree;
}

template <class T>
void compare(const std::vector<T>& image, std::int64_t height, std::int64_t width,
             Connectivity connectivity) {
    const Plain plain = plain_tree(image, height, width, connectivity);
    const ComponentTree<T> tree = build(image, height, width, connectivity, 1);
    std::vector<std::int32_t> pixel_of(tree.size, -1);
    std::int32_t components = 0;
    bool same = true;
    for (std::size_t p = 0; p < image.size(); ++p) {
        components += plain.component[p] == static_cast<std::int32_t>(p);
        std::int32_t& pixel = pixel_of[tree.node[p]];
        if (pixel < 0) pixel = plain.component[p];
        same &= pixel == plain.component[p];
    }
    expect(same, "pixels of every component", height, width);
    expect(components == tree.size, "number of components", height, width);
    bool levels = true, order = tree.parent[0] == 0, parents = true;
    for (std::int32_t i = 0; i < tree.size; ++i) {
        levels &= tree.level[i] == image[pixel_of[i]];
        if (i == 0) continue;
        order &= tree.parent[i] < i && tree.level[tree.parent[i]] < tree.level[i];
        parents &= pixel_of[tree.parent[i]] == plain.component[plain.parent[pixel_of[i]]];
    }
    expect(levels, "levels", height, width);
    expect(order, "topological order", height, width);
    expect(parents, "parents", height, width);

    const ComponentTree<T> twin = build(image, height, width, connectivity, 3);
    bool bits = twin.size == tree.size;
    for (std::int32_t i = 0; bits && i < tree.size; ++i)
        bits = twin.parent[i] == tree.parent[i] && twin.level[i] == tree.level[i];
    for (std::size_t p = 0; bits && p < image.size(); ++p) bits = twin.node[p] == tree.node[p];
    expect(bits, "the same bits with three threads", height, width);
}

// White noise, its running mean (smooth), and both in few levels.
template <class T>
std::vector<T> make_map(std::int64_t height, std::int64_t width, bool smooth, int levels, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<double> map(height * width);
    for (double& value : map) value = random() / 4294967296.0;
    for (std::size_t p = 1; smooth && p < map.size(); ++p) {
        map[p] = 0.8 * map[p - 1] + 0.2 * map[p];
        if (p >= static_cast<std::size_t>(width)) map[p] = 0.7 * map[p - width] + 0.3 * map[p];
    }
    std::vector<T> image(map.size());
    for (std::size_t p = 0; p < map.size(); ++p)
        image[p] = static_cast<T>(levels ? std::floor(map[p] * levels) : map[p] - 0.5);
    return image;
}

template <class T>
void compare_maps(std::int64_t height, std::int64_t width, std::initializer_list<int> levels) {
    for (const Connectivity connectivity : {Connectivity::four, Connectivity::eight})
        for (const bool smooth : {false, true})
            for (const int count : levels)
                compare(make_map<T>(height, width, smooth, count, 7), height, width, connectivity);
}

// 1 1 1 1    Four levels: the frame of ones is the root; in it a component of twos with two peaks, 5 and 4,
// 1 5 2 1    that touch only diagonally. With 8 neighbours they are nested instead: the 5 lies in the 4s.
// 1 2 4 1
// 1 1 1 1
void drawn_by_hand() {
    const std::vector<std::uint8_t> image = {1, 1, 1, 1, 1, 5, 2, 1, 1, 2, 4, 1, 1, 1, 1, 1};
    const ComponentTree<std::uint8_t> four = build(image, 4, 4, Connectivity::four, 1);
    expect(four.size == 4, "by hand: number of components", 4, 4);
    const std::int32_t peak = four.node[5], other = four.node[10], middle = four.node[6];
    expect(four.node[9] == middle && four.node[0] == 0 && four.node[15] == 0, "by hand: pixels", 4, 4);
    expect(four.parent[peak] == middle && four.parent[other] == middle && four.parent[middle] == 0,
           "by hand: parents", 4, 4);
    expect(four.level[peak] == 5 && four.level[other] == 4 && four.level[middle] == 2 && four.level[0] == 1,
           "by hand: levels", 4, 4);
    std::vector<std::int32_t> area(four.size);
    node_areas(four, area.data());
    expect(area[0] == 16 && area[middle] == 4 && area[peak] == 1 && area[other] == 1, "by hand: areas", 4, 4);

    const ComponentTree<std::uint8_t> eight = build(image, 4, 4, Connectivity::eight, 1);
    expect(eight.size == 4 && eight.parent[eight.node[5]] == eight.node[10], "by hand: 8 neighbours", 4, 4);
}

void signed_zeros_are_one_level() {
    const ComponentTree<float> tree = build<float>({0.0f, -0.0f, 0.0f, 1.0f}, 1, 4, Connectivity::four, 1);
    expect(tree.size == 2, "-0 and 0 are one level", 1, 4);
}

// The trees of a batch lie in one block, which outlives them.
void borrowed_memory() {
    for (const std::int64_t side : {9, 300}) {
        const auto image = make_map<float>(side, side, true, 0, 3);
        std::vector<std::int32_t> parent(image.size()), node(image.size());
        std::vector<float> level(image.size());
        const ComponentTree<float> expected = build(image, side, side, Connectivity::four, 1);
        {
            ComponentTree<float> tree;
            tree.parent.borrow(parent.data(), parent.size());
            tree.node.borrow(node.data(), node.size());
            tree.level.borrow(level.data(), level.size());
            MaxTreeBuilder<float>().build(image.data(), side, side, Connectivity::four, 1, tree);
            expect(tree.parent.data() == parent.data() && tree.node.data() == node.data() &&
                       tree.level.data() == level.data(),
                   "the tree lies in the memory that it got", side, side);
        }
        expect(std::equal(parent.begin(), parent.begin() + expected.size, expected.parent.data()) &&
                   std::equal(level.begin(), level.begin() + expected.size, expected.level.data()) &&
                   std::equal(node.begin(), node.end(), expected.node.data()),
               "the same bits in borrowed memory", side, side);
    }
}

void more_threads_than_tiles() {
    const auto image = make_map<float>(300, 300, false, 0, 3);
    build(image, 300, 300, Connectivity::four, std::numeric_limits<int>::max());
}

void a_moved_buffer_is_empty() {
    Buffer<int> from;
    from.reserve(8);
    const Buffer<int> to(std::move(from));
    expect(to.data() && !from.data() && from.reserve(8), "a moved buffer is empty", 1, 8);
}

}  // namespace component_tree_test

int test_component_tree(int, char*[]) {
    using namespace component_tree_test;
    drawn_by_hand();
    signed_zeros_are_one_level();
    borrowed_memory();
    more_threads_than_tiles();
    a_moved_buffer_is_empty();
    const std::int64_t shapes[][2] = {{1, 1},   {1, 9},     {9, 1},     {2, 2},     {3, 5},     {28, 28},
                                      {64, 65}, {181, 181}, {1, 40000}, {40000, 1}, {3, 20000}, {300, 257}};
    for (const auto& [height, width] : shapes) {
        compare_maps<float>(height, width, {0, 1, 3});
        compare_maps<double>(height, width, {0});
        compare_maps<std::uint8_t>(height, width, {2, 200});
        compare_maps<std::uint16_t>(height, width, {3000});
    }
    // Many tiles, and enough components for the parallel sort.
    compare(make_map<float>(1500, 1500, false, 0, 1), 1500, 1500, Connectivity::four);
    compare(make_map<float>(1501, 1499, true, 0, 1), 1501, 1499, Connectivity::eight);
    compare(make_map<std::uint8_t>(1500, 1500, true, 200, 1), 1500, 1500, Connectivity::four);
    if (failures == 0) std::printf("component tree: all right\n");
    return failures != 0;
}
