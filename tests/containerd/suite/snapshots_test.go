// Package suite runs containerd's own suite of tests for snapshotters, core/snapshots/testsuite, against a snapshotter
// behind a socket: the product, or, as a control of this program, containerd's overlayfs behind containerd's own socket.
//
//	LCOW_SUITE_SOCKET       the unix socket
//	LCOW_SUITE_SNAPSHOTTER  the name that requests carry: the product takes any, containerd that of a built-in one
//	LCOW_SUITE_BETWEEN      a unix socket, dialed after each test; the next begins when it closes the connection
//
// Keys of the suite are unique, so that its tests share one server and may run in parallel (containerd's own
// integration test does so); with LCOW_SUITE_BETWEEN, run them with -test.parallel 1.
package suite

import (
	"context"
	"io"
	"net"
	"os"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func TestSnapshotter(t *testing.T) {
	socket, name := os.Getenv("LCOW_SUITE_SOCKET"), os.Getenv("LCOW_SUITE_SNAPSHOTTER")
	if socket == "" || name == "" {
		t.Fatal("LCOW_SUITE_SOCKET and LCOW_SUITE_SNAPSHOTTER must be set")
	}
	open := func(context.Context, string) (snapshots.Snapshotter, func() error, error) {
		connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return nil, nil, err
		}
		done := func() error {
			if err := connection.Close(); err != nil {
				return err
			}
			return between(os.Getenv("LCOW_SUITE_BETWEEN"))
		}
		return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), name), done, nil
	}
	// The suite expects of "overlayfs" what the kernel's overlayfs can do: directories of lower layers cannot be renamed.
	testsuite.SnapshotterSuite(t, "overlayfs", open)
}

// between waits until whoever listens has done what it wants to do between two tests.
func between(socket string) error {
	if socket == "" {
		return nil
	}
	connection, err := net.Dial("unix", socket)
	if err != nil {
		return err
	}
	defer connection.Close()
	_, err = io.Copy(io.Discard, connection)
	return err
}
