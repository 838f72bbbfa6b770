//! Tars made entry by entry, for what no tool would write.

/// Unix mode of most files here.
const MODE: u32 = 0o644;

/// An archive in the making.
#[derive(Default, Clone)]
pub(crate) struct Tar(pub(crate) Vec<u8>);

fn field(block: &mut [u8], at: usize, text: &[u8]) {
    block[at..at + text.len()].copy_from_slice(text);
}

fn record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let body = key.len() + value.len() + 3;
    let mut len = body + 1;
    while len != body + len.to_string().len() {
        len += 1;
    }
    [len.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

impl Tar {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    fn header(
        mut self,
        name: &[u8],
        flag: u8,
        mode: u32,
        link: &[u8],
        device: (u32, u32),
        size: usize,
    ) -> Self {
        let mut b = [0u8; 512];
        field(&mut b, 0, name);
        field(&mut b, 100, format!("{mode:07o}\0").as_bytes());
        field(&mut b, 108, b"0001750\0");
        field(&mut b, 116, b"0000144\0");
        field(&mut b, 124, format!("{size:011o}\0").as_bytes());
        field(&mut b, 136, b"14000000000\0");
        b[156] = flag;
        field(&mut b, 157, link);
        field(&mut b, 257, b"ustar\x0000");
        field(&mut b, 329, format!("{:07o}\0", device.0).as_bytes());
        field(&mut b, 337, format!("{:07o}\0", device.1).as_bytes());
        b[148..156].fill(b' ');
        let sum: u32 = b.iter().map(|&b| u32::from(b)).sum();
        field(&mut b, 148, format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&b);
        self
    }

    fn data(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.header(name.as_bytes(), b'0', MODE, b"", (0, 0), data.len()).data(data)
    }

    pub(crate) fn dir(self, name: &str, mode: u32) -> Self {
        self.header(name.as_bytes(), b'5', mode, b"", (0, 0), 0)
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.header(name.as_bytes(), b'2', 0o777, target.as_bytes(), (0, 0), 0)
    }

    pub(crate) fn link(self, name: &str, target: &str) -> Self {
        self.header(name.as_bytes(), b'1', MODE, target.as_bytes(), (0, 0), 0)
    }

    pub(crate) fn device(self, name: &str, flag: u8, major: u32, minor: u32) -> Self {
        self.header(name.as_bytes(), flag, MODE, b"", (major, minor), 0)
    }

    /// An entry of any type and mode; devices are 1:3.
    pub(crate) fn node(self, name: &str, flag: u8, mode: u32, link: &str, data: &[u8]) -> Self {
        let device = if matches!(flag, b'3' | b'4') { (1, 3) } else { (0, 0) };
        self.header(name.as_bytes(), flag, mode, link.as_bytes(), device, data.len()).data(data)
    }

    /// A PAX header for the next entry.
    pub(crate) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.extended(b'x', records)
    }

    /// A PAX header of either kind.
    pub(crate) fn extended(self, flag: u8, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> = records.iter().flat_map(|(k, v)| record(k.as_bytes(), v)).collect();
        self.header(b"pax", flag, MODE, b"", (0, 0), data.len()).data(&data)
    }

    /// The type of the last entry, if it has no data.
    pub(crate) fn last_flag(&self) -> u8 {
        self.0.len().checked_sub(512).map_or(0, |at| self.0[at + 156])
    }

    /// A file that only claims its size.
    pub(crate) fn claims(self, name: &str, size: usize) -> Self {
        self.header(name.as_bytes(), b'0', MODE, b"", (0, 0), size)
    }

    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}
