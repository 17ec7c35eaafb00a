// Where the neurons of a block lie in a tensor, for one instruction set. Without pooling a block is
// neurons that follow each other in memory. With it a block holds whole cells of the 2x2 pooling,
// so that their mean needs no other block:
//   planes in a row in memory (NCHW): pairs of rows, or where they are too long a piece of both
//   channels last (NHWC): four pixels of a piece of the channels, whose lanes stand one piece
//   behind the other
// Rows and columns beyond the last whole cell belong to no cell, as in torch.

namespace sjr {
namespace SJR_SET {
namespace {

struct Run {  // neurons that follow each other, in a step of the tensor and in the block
  int64_t offset;
  int32_t position, length;
};

// Cells of the pooling: `position` among those of the block, and where their neurons begin, in the
// block.
struct Cells {
  int32_t position, length, top, top_right, bottom, bottom_right;
};

struct Span {  // lanes of one channel; channels last: of `length` channels from this one on
  int64_t channel;
  int32_t position, length;
};

template <int B>
struct Block {
  Run runs[B], pooled[B];
  Cells cells[B];
  Span spans[B];
  int n_runs, n_pooled, n_cells, n_spans;
  int size;         // lanes in use,
  int n_present;    // those of them that the tensor has,
  int n_covered;    // and those in whole cells
  int64_t pattern;  // blocks of one pattern, unless it is -1, have equal spans

  bool is_full() const { return n_present == B; }
  bool is_row() const { return is_full() && n_runs == 1; }

  void clear() {
    n_runs = n_pooled = n_cells = n_spans = size = n_present = n_covered = 0;
    pattern = -1;
  }

  static void add(Run* list, int& n, int64_t offset, int32_t position, int32_t length) {
    Run* const last = list + n - 1;
    if (n > 0 && last->offset + last->length == offset &&
        last->position + last->length == position) {
      last->length += length;
    } else {
      list[n++] = {offset, position, length};
    }
  }

  void add_run(int64_t offset, int64_t position, int64_t length) {
    add(runs, n_runs, offset, int32_t(position), int32_t(length));
    n_present += int(length);
  }

  void add_cells(int64_t offset,
                 int64_t length,
                 int64_t top,
                 int64_t top_right,
                 int64_t bottom,
                 int64_t bottom_right) {
    const int32_t position = n_covered / 4;
    cells[n_cells++] = {position,
                        int32_t(length),
                        int32_t(top),
                        int32_t(top_right),
                        int32_t(bottom),
                        int32_t(bottom_right)};
    add(pooled, n_pooled, offset, position, int32_t(length));
    n_covered += int(4 * length);
  }

  void add_span(int64_t channel, int64_t position, int64_t length) {
    spans[n_spans++] = {channel, int32_t(position), int32_t(length)};
  }
};

// Blocks of items first..last, one after the other; see Shape in job.h for what an item is.
template <int B>
struct Walk {
  const Job& job;
  const Shape shape;
  int64_t item;
  int64_t last;
  int64_t within = 0;           // columns or channels of this item that earlier blocks have
  int64_t plane, row, channel;  // of this item, in rows()
  Block<B> blocks[2];
  int current = 0;

  Walk(const Job& j, int64_t first, int64_t end)
      : job(j),
        shape(j),
        item(first),
        last(end),
        plane(j.pool ? first / shape.rows : 0),
        row(j.pool ? first % shape.rows : 0),
        channel(plane % std::max<int64_t>(j.channels, 1)) {
    fill(blocks[1]);
  }

  const Block<B>& block() const { return blocks[current]; }
  // The one after it; of no runs behind the last.
  const Block<B>& ahead() const { return blocks[1 - current]; }
  bool next() {
    current = 1 - current;
    fill(blocks[1 - current]);
    return block().n_runs > 0;
  }

 private:
  void fill(Block<B>& block) {
    block.clear();
    if (item >= last) {
      return;
    }
    if (!job.pool) {
      neurons(block);
    } else if (job.channels_last) {
      pixels(block);
    } else {
      rows(block);
    }
  }

  void neurons(Block<B>& block) {
    const int64_t size = std::min<int64_t>(B, last - item);
    block.size = int(size);
    block.add_run(item, 0, size);
    if (job.scale && job.channels_last) {
      int64_t c = item % job.channels;
      if (size == B) {
        block.pattern = c;
      }
      for (int64_t begin = 0, end; begin < size; begin = end, c = 0) {
        end = std::min(size, begin + job.channels - c);
        block.add_span(c, begin, end - begin);
      }
    } else if (job.scale) {
      int64_t c = item / job.plane % job.channels;
      int64_t end = job.plane - item % job.plane;
      for (int64_t begin = 0; begin < size;
           begin = end, end += job.plane, c = c + 1 == job.channels ? 0 : c + 1) {
        block.add_span(c, begin, std::min(end, size) - begin);
      }
      if (size == B && block.n_spans == 1) {
        block.pattern = block.spans[0].channel;
      }
    }
    item += size;
  }

  void rows(Block<B>& block) {
    const int64_t width = job.width;
    const int64_t pooled_width = width / 2;
    for (; item < last; next_row()) {
      const int64_t c = channel;
      const int64_t height = std::min<int64_t>(2, job.height - 2 * row);
      const int64_t offset = plane * job.plane + 2 * row * width;
      const int64_t pooled = (plane * (job.height / 2) + row) * pooled_width;
      if (height * width > B) {  // a piece of this item alone
        if (block.size > 0) {
          break;
        }
        const int64_t length = std::min<int64_t>(B / height, width - within);
        for (int64_t i = 0; i < height; ++i) {
          block.add_run(offset + within + i * width, i * length, length);
        }
        if (height == 2 && length >= 2) {
          block.add_cells(pooled + within / 2, length / 2, 0, 1, length, length + 1);
        }
        block.add_span(c, 0, height * length);
        block.size = int(height * length);
        within += length;
        if (within == width) {
          within = 0;
          next_row();
        }
        break;
      }
      const int64_t position = block.size;
      const int64_t length = height * width;
      if (position + length > B) {
        break;
      }
      block.add_run(offset, position, length);
      if (height == 2 && width >= 2) {
        block.add_cells(
            pooled, pooled_width, position, position + 1, position + width, position + width + 1);
      }
      Span* const span = block.spans + block.n_spans - 1;
      if (block.n_spans > 0 && span->channel == c) {
        span->length += int32_t(length);
      } else {
        block.add_span(c, position, length);
      }
      block.size += int(length);
    }
    if (block.size == B && block.n_spans == 1) {
      block.pattern = block.spans[0].channel;
    }
  }

  void next_row() {
    ++item;
    if (++row < shape.rows) {
      return;
    }
    row = 0;
    ++plane;
    if (++channel >= job.channels) {
      channel = 0;
    }
  }

  void pixels(Block<B>& block) {
    const int64_t channels = job.channels;
    const int64_t line = job.width * channels;
    const int64_t first = within;
    while (item < last && block.size < B) {
      const int64_t column = item % shape.columns;
      const int64_t row = item / shape.columns % shape.rows;
      const int64_t sample = item / shape.columns / shape.rows;
      const int64_t length = std::min<int64_t>(channels - within, (B - block.size) / 4);
      const int64_t position = block.size;
      const int64_t offset =
          sample * job.channels * job.plane + 2 * row * line + 2 * column * channels + within;
      const bool right = 2 * column + 1 < job.width;
      const bool below = 2 * row + 1 < job.height;
      block.add_run(offset, position, length);
      if (right) {
        block.add_run(offset + channels, position + length, length);
      }
      if (below) {
        block.add_run(offset + line, position + 2 * length, length);
      }
      if (right && below) {
        block.add_run(offset + line + channels, position + 3 * length, length);
        const int64_t pooled =
            ((sample * (job.height / 2) + row) * (job.width / 2) + column) * channels + within;
        block.add_cells(pooled,
                        length,
                        position,
                        position + length,
                        position + 2 * length,
                        position + 3 * length);
      }
      for (int k = 0; k < 4; ++k) {
        block.add_span(within, position + k * length, length);
      }
      block.size += int(4 * length);
      within += length;
      if (within == channels) {
        within = 0;
        ++item;
      }
    }
    if (block.size == B) {
      block.pattern = first;
    }
  }
};

// Numbers between a step of a tensor of storage type S and a block of arithmetic type C.
template <class S, class C>
SJR_INLINE void read_run(const S* from, int64_t n, C* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<S, C>) {
    for (; i + LANES<C> <= n; i += LANES<C>) {
      store(to + i, load(from + i));
    }
  }
  for (; i < n; ++i) {
    to[i] = widen<C>(from[i]);
  }
}

// Past the cache where `stream` is set and the place is aligned.
template <class S, class C>
SJR_INLINE void write_run(const C* from, int64_t n, S* to, bool stream) {
  constexpr int N = SJR_VECTOR_BYTES / int(sizeof(S));  // of S in a vector
  int64_t i = 0;
  if (stream && reinterpret_cast<uintptr_t>(to) % SJR_VECTOR_BYTES == 0) {
    for (; i + N <= n; i += N) {
      alignas(SJR_VECTOR_BYTES) S narrow[N];
      for (int k = 0; k < N; ++k) {
        narrow[k] = Narrow<S, C>::from(from[i + k]);
      }
      Vec<C> bits;
      std::memcpy(&bits, narrow, sizeof bits);
      put<std::is_same_v<C, float>>(reinterpret_cast<C*>(to + i), bits);
    }
  }
  for (; i < n; ++i) {
    to[i] = Narrow<S, C>::from(from[i]);
  }
}

template <class S>
SJR_INLINE void fetch_run(const S* row, const Run& run) {
  const char* const start = reinterpret_cast<const char*>(row + run.offset);
  for (int64_t i = 0; i < run.length * int64_t(sizeof(S)); i += 64) {
    __builtin_prefetch(start + i);
  }
}

// Of every step; and asks for what the next block will read.
template <class S, class C>
void read_runs(const Run* runs,
               int n,
               const Run* ahead,
               int n_ahead,
               const S* from,
               int64_t stride,
               int64_t T,
               C* to,
               int64_t to_stride) {
  for (int64_t t = 0; t < T; ++t, from += stride, to += to_stride) {
    for (int i = 0; i < n; ++i) {
      read_run(from + runs[i].offset, runs[i].length, to + runs[i].position);
    }
    for (int i = 0; i < n_ahead; ++i) {
      fetch_run(from, ahead[i]);
    }
  }
}

template <class S, class C>
void write_runs(const Run* runs,
                int n,
                const C* from,
                int64_t from_stride,
                int64_t T,
                S* to,
                int64_t stride,
                bool stream) {
  for (int64_t t = 0; t < T; ++t, from += from_stride, to += stride) {
    for (int i = 0; i < n; ++i) {
      write_run(from + runs[i].position, runs[i].length, to + runs[i].offset, stream);
    }
  }
}

// Means of cells whose neurons alternate in memory, N at a time, then the rest with vectors half as
// long.
template <int N, int... I>
struct Numbers : Numbers<N - 1, N - 1, I...> {};
template <int... I>
struct Numbers<0, I...> {};

template <class C, int N>
struct Piece {
  typedef C V __attribute__((vector_size(N * sizeof(C))));
  typedef typename std::conditional<sizeof(C) == 4, int32_t, int64_t>::type Index;
  typedef Index I __attribute__((vector_size(N * sizeof(C))));

  static SJR_TARGET_INLINE V get(const C* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static SJR_TARGET_INLINE void set(C* p, V v) { std::memcpy(p, &v, sizeof v); }

#if defined(__clang__)
#define SJR_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SJR_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, I{__VA_ARGS__})
#endif
  // Of a and b behind it: every group of H lanes and the group after it become their sum.
  template <int H, int... K>
  static SJR_TARGET_INLINE V sum_groups(V a, V b, Numbers<0, K...>) {
    return SJR_SHUFFLE(a, b, (K / H * 2 * H + K % H)...) +
           SJR_SHUFFLE(a, b, (K / H * 2 * H + H + K % H)...);
  }
  // Every group of H lanes stands twice: the first half of what that gives, or the second.
  template <int H, int HALF, int... K>
  static SJR_TARGET_INLINE V twice_each(V a, Numbers<0, K...>) {
    return SJR_SHUFFLE(a, a, ((K + HALF * N) / (2 * H) * H + (K + HALF * N) % H)...);
  }
#undef SJR_SHUFFLE
};

template <class C, int N = LANES<C>>
SJR_INLINE void pool_pairs(const C* top, const C* bottom, int n, C* to) {
  if constexpr (N == 1) {
    if (n > 0) {
      *to = C(0.25) * ((top[0] + bottom[0]) + (top[1] + bottom[1]));
    }
  } else {
    using P = Piece<C, N>;
    for (; n >= N; n -= N, top += 2 * N, bottom += 2 * N, to += N) {
      const auto low = P::get(top) + P::get(bottom);
      const auto high = P::get(top + N) + P::get(bottom + N);
      P::set(to, C(0.25) * P::template sum_groups<1>(low, high, Numbers<N>{}));
    }
    if (n > 0) {
      pool_pairs<C, N / 2>(top, bottom, n, to);
    }
  }
}

// The gradient of a mean goes to its four neurons in equal shares.
template <class C, int N = LANES<C>>
SJR_INLINE void share_pairs(const C* from, int n, C* top, C* bottom) {
  if constexpr (N == 1) {
    if (n > 0) {
      top[0] = top[1] = bottom[0] = bottom[1] = C(0.25) * from[0];
    }
  } else {
    using P = Piece<C, N>;
    for (; n >= N; n -= N, top += 2 * N, bottom += 2 * N, from += N) {
      const auto share = C(0.25) * P::get(from);
      const auto low = P::template twice_each<1, 0>(share, Numbers<N>{});
      const auto high = P::template twice_each<1, 1>(share, Numbers<N>{});
      P::set(top, low);
      P::set(top + N, high);
      P::set(bottom, low);
      P::set(bottom + N, high);
    }
    if (n > 0) {
      share_pairs<C, N / 2>(from, n, top, bottom);
    }
  }
}

template <class C>
SJR_INLINE void pool_rows(const C* a, const C* b, const C* c, const C* d, int n, C* to) {
  int i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) {
    store<C>(to + i, C(0.25) * ((load(a + i) + load(c + i)) + (load(b + i) + load(d + i))));
  }
  for (; i < n; ++i) {
    to[i] = C(0.25) * ((a[i] + c[i]) + (b[i] + d[i]));
  }
}

template <class C>
SJR_INLINE void share_rows(const C* from, int n, C* a, C* b, C* c, C* d) {
  int i = 0;
  for (; i + LANES<C> <= n; i += LANES<C>) {
    const Vec<C> share = C(0.25) * load(from + i);
    store(a + i, share);
    store(b + i, share);
    store(c + i, share);
    store(d + i, share);
  }
  for (; i < n; ++i) {
    a[i] = b[i] = c[i] = d[i] = C(0.25) * from[i];
  }
}

// The same of n neurons in rows of 2 * H, which no cell leaves out.
template <int H, class C>
void pool_narrow(const C* s, int64_t n, C* to) {
  constexpr int N = LANES<C>;
  using P = Piece<C, N>;
  for (; n > 0; n -= 4 * N, s += 4 * N, to += N) {
    const auto low = P::template sum_groups<1>(P::get(s), P::get(s + N), Numbers<N>{});
    const auto high = P::template sum_groups<1>(P::get(s + 2 * N), P::get(s + 3 * N), Numbers<N>{});
    P::set(to, C(0.25) * P::template sum_groups<H>(low, high, Numbers<N>{}));
  }
}

template <int H, class C>
void share_narrow(const C* from, int64_t n, C* gs) {
  constexpr int N = LANES<C>;
  using P = Piece<C, N>;
  for (; n > 0; n -= 4 * N, from += N, gs += 4 * N) {
    const auto share = C(0.25) * P::get(from);
    const auto low = P::template twice_each<H, 0>(share, Numbers<N>{});
    const auto high = P::template twice_each<H, 1>(share, Numbers<N>{});
    P::set(gs, P::template twice_each<1, 0>(low, Numbers<N>{}));
    P::set(gs + N, P::template twice_each<1, 1>(low, Numbers<N>{}));
    P::set(gs + 2 * N, P::template twice_each<1, 0>(high, Numbers<N>{}));
    P::set(gs + 3 * N, P::template twice_each<1, 1>(high, Numbers<N>{}));
  }
}

// Calls f with half the width as a constant, if the block is whole cells of a width for which one
// vector has several.
template <class C, class F>
bool if_narrow(const Job& job, const Block<BLOCK<C>>& block, F f) {
  if (job.channels_last || block.n_covered < BLOCK<C> || job.width > LANES<C>) {
    return false;
  }
  switch (job.width) {
    case 4:
      f(std::integral_constant<int, 2>{});
      return true;
    case 8:
      f(std::integral_constant<int, 4>{});
      return true;
    case 16:
      f(std::integral_constant<int, 8>{});
      return true;
    default:
      return false;
  }
}

// Means of all cells of a block, of every step.
template <class C>
void pool_block(const Job& job, const Block<BLOCK<C>>& block, const C* s, C* to) {
  constexpr int B = BLOCK<C>;
  if (if_narrow<C>(job, block, [&](auto half) { pool_narrow<half()>(s, job.T * B, to); })) {
    return;
  }
  for (int64_t t = 0; t < job.T; ++t, s += B, to += B / 4) {
    for (int i = 0; i < block.n_cells; ++i) {
      const Cells& c = block.cells[i];
      if (job.channels_last) {
        pool_rows(s + c.top,
                  s + c.top_right,
                  s + c.bottom,
                  s + c.bottom_right,
                  c.length,
                  to + c.position);
      } else {
        pool_pairs(s + c.top, s + c.bottom, c.length, to + c.position);
      }
    }
  }
}

template <class C>
void share_block(const Job& job, const Block<BLOCK<C>>& block, const C* from, C* gs) {
  constexpr int B = BLOCK<C>;
  if (if_narrow<C>(job, block, [&](auto half) { share_narrow<half()>(from, job.T * B, gs); })) {
    return;
  }
  if (block.n_covered < B) {
    std::memset(gs, 0, size_t(job.T * B) * sizeof(C));
  }
  for (int64_t t = 0; t < job.T; ++t, gs += B, from += B / 4) {
    for (int i = 0; i < block.n_cells; ++i) {
      const Cells& c = block.cells[i];
      if (job.channels_last) {
        share_rows(from + c.position,
                   c.length,
                   gs + c.top,
                   gs + c.top_right,
                   gs + c.bottom,
                   gs + c.bottom_right);
      } else {
        share_pairs(from + c.position, c.length, gs + c.top, gs + c.bottom);
      }
    }
  }
}

}  // namespace
}  // namespace SJR_SET
}  // namespace sjr
