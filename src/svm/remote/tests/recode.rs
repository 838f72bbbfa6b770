//! Streams that flow in both directions at once, over a link with a real agent.

use super::{agent, connect, transfer_file};
use crate::svm::{
    Channel, Compression, ExpandLimits, RecodeSummary,
    remote::{RemoteAgent, control_frame},
};
use std::time::Duration;
use svm_protocol::{DATA_PAYLOAD, FrameType, Operation, link::WINDOW};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};

/// Runs `operation` on a channel of its own: what came out, and the summary. The reader begins after `pause`.
async fn recode(
    agent: &RemoteAgent,
    operation: &Operation,
    input: &[u8],
    pause: Duration,
) -> (Vec<u8>, RecodeSummary) {
    let channel: Channel = Box::new(agent.open_channel().await.unwrap());
    let (mut read, mut write) = tokio::io::split(channel);
    let sending = async {
        write.write_all(&control_frame(FrameType::Request, operation).unwrap()).await.unwrap();
        for chunk in input.chunks(DATA_PAYLOAD) {
            write.write_all(&svm_protocol::header(FrameType::Data, chunk.len())).await.unwrap();
            write.write_all(chunk).await.unwrap();
        }
        write.write_all(&svm_protocol::header(FrameType::End, 0)).await.unwrap();
    };
    let receiving = async {
        tokio::time::sleep(pause).await;
        let mut all = Vec::new();
        loop {
            let mut head = [0; svm_protocol::HEADER_LEN];
            read.read_exact(&mut head).await.unwrap();
            let (kind, len) = svm_protocol::parse_header(head).unwrap();
            let mut payload = vec![0; len];
            read.read_exact(&mut payload).await.unwrap();
            match kind {
                FrameType::Data => all.extend_from_slice(&payload),
                FrameType::Result => return (all, serde_json::from_slice(&payload).unwrap()),
                other => panic!("{other:?}: {}", String::from_utf8_lossy(&payload)),
            }
        }
    };
    let both = async { tokio::join!(sending, receiving).1 };
    timeout(Duration::from_mins(2), both).await.expect("dead lock")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_flow_both_ways_with_and_without_a_transfer_disk_and_none_pile_up() {
    // Noise, of which as much comes out as goes in, then zeros, of which much less or much more does.
    let mut plain: Vec<u8> =
        (0..3 * WINDOW as u32).map(|n| (n.wrapping_mul(n).wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    plain.resize(24 << 20, 0);
    for transfer in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let transfer = transfer.then(|| transfer_file(folder.path()));
        let agent = connect(agent(folder.path()), transfer).await.unwrap();
        for format in [Compression::Plain, Compression::Gzip, Compression::Zstd] {
            let mut expected = Vec::new();
            svm_agent::recode::compress(&mut &plain[..], format, format.level(), &mut expected).unwrap();
            let compress = Operation::Compress { format, level: format.level() };
            let expand = Operation::Expand { format: None, limits: ExpandLimits::of_output(1 << 30) };
            for pause in [Duration::ZERO, Duration::from_millis(300)] {
                let (packed, summary) = recode(&agent, &compress, &plain, pause).await;
                assert!(packed == expected, "{format}: {} bytes", packed.len());
                let (bytes_in, bytes_out) = (plain.len() as u64, packed.len() as u64);
                assert_eq!(summary, RecodeSummary { format, bytes_in, bytes_out });
                let (found, summary) = recode(&agent, &expand, &packed, pause).await;
                assert!(found == plain, "{format}: {} bytes", found.len());
                let (bytes_in, bytes_out) = (packed.len() as u64, plain.len() as u64);
                assert_eq!(summary, RecodeSummary { format, bytes_in, bytes_out });
            }
        }
        let (queued, received) = agent.most_held();
        assert!(queued <= 4 * WINDOW && received <= 3 * WINDOW, "{queued} and {received} bytes were held");
    }
}
