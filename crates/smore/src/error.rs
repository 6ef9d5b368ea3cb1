//! What can be wrong with an adapter's description.

/// A [`std::result::Result`] with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an adapter cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A setting is out of range or two settings contradict each other.
    #[error("{0}")]
    Config(String),
}

impl Error {
    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self::Config(message.into())
    }
}
