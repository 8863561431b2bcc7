//! Arbitrary streams of a source: hellos, messages, pages, saved state.

#![no_main]

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use memory::{RamBlock, RamConfig};
use migration::{
    Accept, Block, Closer, ConnectionLimit, Decision, Destination, DestinationDisk, Fate, Host,
    Journal, NewImage, NoJournal, Offer, Progress, Receiving, Refusal, StartFailure, Stream,
    receive,
};

/// A stream with fixed input. Answers are ignored.
struct Said(io::Cursor<Vec<u8>>);

impl Read for Said {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        self.0.read(data)
    }
}

impl Write for Said {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Stream for Said {
    fn set_patience(&self, _: Duration) -> io::Result<()> {
        Ok(())
    }

    fn closer(&self) -> io::Result<Closer> {
        Ok(Closer::new(|| {}))
    }
}

struct Connections(Vec<Vec<u8>>);

impl Accept for Connections {
    fn accept(&mut self, _: Duration) -> io::Result<Option<Box<dyn Stream>>> {
        match self.0.pop() {
            Some(said) => Ok(Some(Box::new(Said(io::Cursor::new(said))))),
            None => Err(io::ErrorKind::NotConnected.into()),
        }
    }
}

/// A disk that ends within a page. A write that is not within it panics.
struct Image(Mutex<[u8; Self::SIZE]>);

impl Image {
    const SIZE: usize = 10_000;
}

impl NewImage for Image {
    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let offset = offset as usize;
        let mut content = self.0.lock().expect("a disk");
        content[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(offset, &vec![0; len as usize])
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

struct Machine(Arc<RamBlock>, Vec<DestinationDisk>);

impl Destination for Machine {
    fn blocks(&self) -> Vec<Block> {
        vec![Block {
            name: "ram".to_owned(),
            ram: Arc::clone(&self.0),
        }]
    }

    fn disks(&self) -> Vec<DestinationDisk> {
        self.1.clone()
    }

    fn dry_run(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn load(&mut self, _: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn take_over(&mut self) -> Result<(), Refusal> {
        Ok(())
    }

    fn start(&mut self, _: Duration, _: bool) -> Result<Instant, StartFailure> {
        Ok(Instant::now())
    }

    fn discard(&mut self) {}
}

struct Machines;

impl Host for Machines {
    fn prepare(
        &self,
        _: uuid::Uuid,
        offer: &Offer,
        _: Vec<File>,
    ) -> Result<Box<dyn Destination>, Refusal> {
        let ram = RamBlock::new(&RamConfig::anonymous(64 << 10)).expect("memory");
        let disk = DestinationDisk {
            name: "d".to_owned(),
            size: Image::SIZE as u64,
            image: Arc::new(Image(Mutex::new([0; Image::SIZE]))),
        };
        let disks = vec![disk; usize::from(!offer.disks.is_empty())];
        Ok(Box::new(Machine(Arc::new(ram), disks)))
    }

    fn journal(&self, _: uuid::Uuid, _: &str) -> io::Result<Box<dyn Journal>> {
        Ok(Box::new(NoJournal))
    }

    fn fate(&self, _: uuid::Uuid) -> Fate {
        Fate::Unknown
    }
}

/// A frame whose checksum is right, so that what is in it is read.
fn frame(bytes: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u8>> {
    let kind: u16 = *bytes.choose(&[1, 2, 3, 16, 17, 18, 19, 32, 77])?;
    let mut body: Vec<u8> = match bytes.int_in_range(0_u8..=3)? {
        // Whole messages, which are hard to hit upon.
        0 => bytes.choose(MESSAGES)?.to_vec(),
        _ => bytes.arbitrary()?,
    };
    if bytes.ratio(1_u8, 8_u8)? && !body.is_empty() {
        let at = bytes.choose_index(body.len())?;
        body[at] ^= bytes.arbitrary::<u8>()?;
    }
    let mut frame = kind.to_le_bytes().to_vec();
    frame.extend([0, 0]);
    frame.extend((body.len() as u32).to_le_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&frame);
    crc.update(&body);
    frame.extend(crc.finalize().to_le_bytes());
    frame.extend(body);
    Ok(frame)
}

/// CBOR: a hello of the control channel, an offer of one block, one with a disk, and what follows.
const MESSAGES: &[&[u8]] = &[
    b"\xa4\x65magic\x72whimbrel-migration\x68versions\x82\x01\x01\x69migration\x50aaaaaaaaaaaaaaaa\x67channel\x67Control",
    b"\xa4\x65magic\x72whimbrel-migration\x68versions\x82\x01\x01\x69migration\x50aaaaaaaaaaaaaaaa\x67channel\xa1\x63Ram\xa1\x65index\x00",
    b"\xa1\x67Prepare\xa6\x62vm\x61v\x67machine\x40\x66blocks\x81\xa2\x64name\x63ram\x64size\x1a\x00\x01\x00\x00\x6bconnections\x01\x68postcopy\xf4\x65given\xf4",
    b"\xa1\x67Prepare\xa7\x62vm\x61v\x67machine\x40\x66blocks\x81\xa2\x64name\x63ram\x64size\x1a\x00\x01\x00\x00\x6bconnections\x01\x68postcopy\xf4\x65given\xf4\x65disks\x81\xa2\x64name\x61d\x64size\x19\x27\x10",
    b"\xa1\x65Round\x01",
    b"\x65Guess",
    b"\xa1\x65State\xa2\x65round\x01\x68postcopy\xf4",
    b"\xa1\x66Commit\xa2\x6cstood_for_ns\x01\x66paused\xf4",
    b"\xa1\x64Ping\x01",
    b"\x01\x00\x00\x00",
];

fuzz_target!(|input: &[u8]| {
    let mut bytes = Unstructured::new(input);
    let mut connections = Vec::new();
    while let Ok(count) = bytes.int_in_range(0_u8..=8) {
        let mut said = Vec::new();
        for _ in 0..count {
            let Ok(frame) = frame(&mut bytes) else { break };
            said.extend(frame);
        }
        connections.push(said);
        if bytes.is_empty() || connections.len() == 4 {
            break;
        }
    }
    let progress = Progress::default();
    let decision = Decision::default();
    let (watched, decides) = (progress.clone(), decision.clone());
    // Where it waits for a decision, it is over.
    let watch = std::thread::spawn(move || {
        while !watched.report().phase.is_over() {
            let _ = decides.resolve(migration::Resolution::Discard);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let receiving = Receiving {
        accept: &mut Connections(connections),
        host: &Machines,
        progress: &progress,
        decision: &decision,
        limit: &ConnectionLimit::default(),
        once: false,
        patience: Duration::from_millis(20),
        lingers: &|| {},
    };
    let _ = receive(receiving);
    watch.join().expect("a thread that ends");
});
