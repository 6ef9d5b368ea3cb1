//! Views into device buffers: a buffer, a range of it, and for matrices the strides.

use crate::Device;
use std::ops::Range;

/// A read-only range of a device buffer.
pub struct View<'a, D: Device> {
    /// The buffer looked into.
    pub buf: &'a D::Buf,
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl<D: Device> Clone for View<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for View<'_, D> {}

impl<'a, D: Device> View<'a, D> {
    /// The whole of `buf`, which holds `len` elements.
    pub fn new(buf: &'a D::Buf, len: usize) -> Self {
        Self { buf, start: 0, len }
    }

    /// Elements `range` of this view.
    ///
    /// # Panics
    /// If the range reaches past the view.
    pub fn at(self, range: Range<usize>) -> Self {
        assert!(range.end <= self.len, "range {range:?} of a view of {}", self.len);
        Self { buf: self.buf, start: self.start + range.start, len: range.len() }
    }

    /// Seen as a matrix of `rows` x `cols` with consecutive rows.
    pub fn mat(self, rows: usize, cols: usize) -> Mat<'a, D> {
        self.mat_strided(rows, cols, cols)
    }

    /// Seen as a matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the matrix reaches past the view.
    pub fn mat_strided(self, rows: usize, cols: usize, row_stride: usize) -> Mat<'a, D> {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= self.len, "matrix outside its view");
        Mat { view: self, rows, cols, row_stride, col_stride: 1 }
    }
}

/// A writable range of a device buffer.
pub struct ViewMut<'a, D: Device> {
    /// The buffer looked into.
    pub buf: &'a mut D::Buf,
    /// First element.
    pub start: usize,
    /// Number of elements.
    pub len: usize,
}

impl<'a, D: Device> ViewMut<'a, D> {
    /// The whole of `buf`, which holds `len` elements.
    pub fn new(buf: &'a mut D::Buf, len: usize) -> Self {
        Self { buf, start: 0, len }
    }

    /// A shorter-lived view of the same range.
    pub fn rb(&mut self) -> ViewMut<'_, D> {
        ViewMut { buf: self.buf, start: self.start, len: self.len }
    }

    /// The same range, to be read.
    pub fn view(&self) -> View<'_, D> {
        View { buf: self.buf, start: self.start, len: self.len }
    }

    /// Elements `range` of this view.
    ///
    /// # Panics
    /// If the range reaches past the view.
    pub fn at(self, range: Range<usize>) -> Self {
        assert!(range.end <= self.len, "range {range:?} of a view of {}", self.len);
        Self { buf: self.buf, start: self.start + range.start, len: range.len() }
    }

    /// Seen as a matrix of `rows` x `cols` with consecutive rows.
    pub fn mat(self, rows: usize, cols: usize) -> MatMut<'a, D> {
        self.mat_strided(rows, cols, cols)
    }

    /// Seen as a matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the matrix reaches past the view.
    pub fn mat_strided(self, rows: usize, cols: usize, row_stride: usize) -> MatMut<'a, D> {
        assert!(rows == 0 || (rows - 1) * row_stride + cols <= self.len, "matrix outside its view");
        MatMut { view: self, rows, cols, row_stride }
    }
}

/// A matrix operand of a product.
pub struct Mat<'a, D: Device> {
    /// Where its elements are.
    pub view: View<'a, D>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
    /// Elements from one column to the next.
    pub col_stride: usize,
}

impl<D: Device> Clone for Mat<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Mat<'_, D> {}

impl<D: Device> Mat<'_, D> {
    /// The transpose, without moving anything.
    #[must_use]
    pub fn t(self) -> Self {
        Self {
            view: self.view,
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
        }
    }
}

/// A matrix that receives a product.
pub struct MatMut<'a, D: Device> {
    /// Where its elements are.
    pub view: ViewMut<'a, D>,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Elements from one row to the next.
    pub row_stride: usize,
}
