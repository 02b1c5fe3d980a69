// A padded batch by its mask, laid out on the host: what bertfast/packing does with numpy where no
// module was built. A batch of a few thousand tokens takes some microseconds here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "bindings/module.h"

namespace bertfast {
namespace of_mask {

namespace py = pybind11;

using Numbers = py::array_t<int64_t, py::array::c_style>;

// (rows, length) values in memory, of which those that are not 0 count.
template<class T>
struct Mask {
  const T* values;
  int64_t rows, length;
};

// Calls with the array's values as they are: bool or int64.
template<class Function>
auto with_mask(const py::array& array, Function function) {
  const bool dense = array.ndim() == 2 && (array.flags() & py::array::c_style);
  if (!dense) throw py::value_error("a mask must be a dense array of two dimensions");
  const auto of = [&](auto zero) {
    using T = decltype(zero);
    return Mask<T>{static_cast<const T*>(array.data()), array.shape(0), array.shape(1)};
  };
  if (py::isinstance<py::array_t<bool>>(array)) return function(of(false));
  if (py::isinstance<py::array_t<int64_t>>(array)) return function(of(int64_t{}));
  throw py::type_error("a mask must be of bool or int64");
}

// How many tokens of each row are attended; whether each row's first is; whether another token is
// there that is not the padding.
py::tuple look(const py::array& array, const py::object& ids, int64_t token) {
  const int64_t* id = nullptr;
  if (!ids.is_none()) {
    if (!py::isinstance<Numbers>(ids)) throw py::type_error("ids must be a dense array of int64");
    const auto given = py::reinterpret_borrow<Numbers>(ids);
    if (given.size() != array.size()) throw py::value_error("ids must have the mask's shape");
    id = given.data();
  }
  return with_mask(array, [&](auto mask) {
    Numbers lengths(mask.rows);
    bool begins = true, read = false;
    for (int64_t row = 0; row < mask.rows; ++row) {
      const auto* values = mask.values + row * mask.length;
      int64_t count = 0;
      for (int64_t i = 0; i < mask.length; ++i) count += values[i] != 0;
      if (id && count < mask.length) {
        const int64_t* own = id + row * mask.length;
        for (int64_t i = 0; i < mask.length; ++i) read |= values[i] == 0 && own[i] != token;
      }
      lengths.mutable_data()[row] = count;
      begins &= mask.length > 0 && values[0] != 0;
    }
    return py::make_tuple(lengths, begins, read);
  });
}

// Where each packed token stands in the padded batch, and where in its row; and, if wanted, which
// of them comes back to each place of the padded batch: its own, or its row's first.
Numbers places(const py::array& array, int64_t tokens, bool wants_sources) {
  return with_mask(array, [&](auto mask) {
    Numbers numbers(2 * tokens + (wants_sources ? mask.rows * mask.length : 0));
    int64_t* index = numbers.mutable_data();
    int64_t* columns = index + tokens;
    int64_t* source = columns + tokens;
    int64_t found = 0;
    for (int64_t row = 0; row < mask.rows; ++row) {
      const auto* values = mask.values + row * mask.length;
      const int64_t first = found;
      for (int64_t i = 0; i < mask.length; ++i) {
        const bool attended = values[i] != 0;
        if (attended) {
          if (found == tokens) throw py::value_error("more tokens are attended than was said");
          index[found] = row * mask.length + i;
          columns[found] = i;
        }
        if (wants_sources) *source++ = attended ? found : first;
        found += attended;
      }
    }
    if (found != tokens) throw py::value_error("fewer tokens are attended than was said");
    return numbers;
  });
}

// Calls with each tile of a batch by its bounds: its number, a sequence, a first position in it, a
// number of sequences. A group of sequences that fit one tile together shares it; a longer sequence
// has tiles of its own. Returns how many there are.
template<class Function>
int64_t each_tile(const int64_t* bound, int64_t count, int64_t tile, Function take) {
  int64_t number = 0;
  for (int64_t start = 0, after; start < count; start = after) {
    after = start + 1;
    while (after < count && bound[after + 1] - bound[start] <= tile) ++after;
    for (int64_t at = 0; at < bound[after] - bound[start]; at += tile) {
      take(number++, start, at, after - start);
    }
  }
  return number;
}

// As take of each_tile: writes the tile's three numbers.
template<class T>
auto write_tiles(T* to) {
  return [to](int64_t number, int64_t start, int64_t at, int64_t together) {
    to[3 * number] = static_cast<T>(start);
    to[3 * number + 1] = static_cast<T>(at);
    to[3 * number + 2] = static_cast<T>(together);
  };
}

int64_t count_tiles(const int64_t* bound, int64_t count, int64_t tile) {
  return each_tile(bound, count, tile, [](int64_t, int64_t, int64_t, int64_t) {});
}

// (tiles, 3) of a batch.
Numbers tiles(const Numbers& bounds, int64_t tile) {
  if (bounds.ndim() != 1 || bounds.size() < 1 || tile < 1) {
    throw py::value_error("bounds and a size of tiles were expected");
  }
  const int64_t count = bounds.size() - 1;
  Numbers made({count_tiles(bounds.data(), count, tile), int64_t{3}});
  each_tile(bounds.data(), count, tile, write_tiles(made.mutable_data()));
  return made;
}

// The numbers of a batch that fills a bucket, as in packing/buckets.py, which names the buckets: a
// row of `rooms` has a bucket's tokens, its room for sequences and for tiles, the place of the
// number of tiles, and how many numbers there are. Returns which row is the first that holds the
// batch, its numbers, and how many tiles are the batch's own; or nothing.
py::object fill(const Numbers& lengths, int64_t tile, const Numbers& rooms) {
  if (lengths.ndim() != 1 || rooms.ndim() != 2 || rooms.shape(1) != 5 || tile < 1) {
    throw py::value_error("lengths, a size of tiles and buckets were expected");
  }
  const int64_t count = lengths.size();
  std::vector<int64_t> bounds(count + 1);
  for (int64_t i = 0; i < count; ++i) {
    if (lengths.data()[i] < 0) throw py::value_error("a length is below 0");
    bounds[i + 1] = bounds[i] + lengths.data()[i];
  }
  const int64_t total = bounds[count], own = count_tiles(bounds.data(), count, tile);
  for (int64_t row = 0; row < rooms.shape(0); ++row) {
    const int64_t* room = rooms.data() + 5 * row;
    const int64_t tokens = room[0], sequences = room[1], count_at = room[3], size = room[4];
    const int64_t fillers = (tokens - total + tile - 1) / tile, used = own + fillers;
    if (tokens < total || count + fillers > sequences || used > room[2]) continue;
    if (count_at <= sequences || size < count_at + 4 + 3 * used || tokens > INT32_MAX) {
      throw py::value_error("a bucket has no room for its numbers");
    }
    py::array_t<int32_t> numbers(size);
    int32_t* to = numbers.mutable_data();
    std::fill(to, to + size, 0);
    for (int64_t i = 0; i <= count; ++i) to[i] = static_cast<int32_t>(bounds[i]);
    for (int64_t i = count + 1; i <= sequences; ++i) {
      to[i] = static_cast<int32_t>(std::min(total + tile * (i - count), tokens));
    }
    to[count_at] = static_cast<int32_t>(used);
    int32_t* listed = to + count_at + 4;
    each_tile(bounds.data(), count, tile, write_tiles(listed));
    for (int64_t i = 0; i < fillers; ++i) write_tiles(listed)(own + i, count + i, 0, 1);
    return py::make_tuple(row, numbers, own);
  }
  return py::none();
}

const Binding binding([](py::module_& m) {
  m.def("look", &look, py::arg("mask"), py::arg("ids").none(true), py::arg("token"));
  m.def("places", &places, py::arg("mask"), py::arg("tokens"), py::arg("wants_sources"));
  m.def("tiles", &tiles, py::arg("bounds").noconvert(), py::arg("tile"));
  m.def("fill", &fill, py::arg("lengths").noconvert(), py::arg("tile"),
        py::arg("rooms").noconvert());
});

}  // namespace of_mask
}  // namespace bertfast
