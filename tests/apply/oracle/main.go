// Unpacks a tar from standard input into a folder as an engine's overlay driver does:
//
//	oracle moby|containerd FOLDER
//	oracle containerd FOLDER LAYER…
//
// The second form unpacks into FOLDER/upper on the layers FOLDER/LAYER…, nearest first.
//
// Built by tests/apply/engines.rs from the distribution's packages of both engines.
package main

import (
	"context"
	"fmt"
	"os"
	"syscall"

	containerd "github.com/containerd/containerd/archive"
	moby "github.com/docker/docker/pkg/archive"
)

func main() {
	if err := unpack(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func unpack(engine, folder string) error {
	// Both unpack so: moby always, containerd by resolving every path below its root.
	if err := syscall.Chroot(folder); err != nil {
		return err
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	syscall.Umask(0)
	if engine == "moby" {
		return moby.Unpack(os.Stdin, "/", &moby.TarOptions{WhiteoutFormat: moby.OverlayWhiteoutFormat})
	}
	root, options := "/", []containerd.ApplyOpt{containerd.WithConvertWhiteout(containerd.OverlayConvertWhiteout)}
	if layers := os.Args[3:]; len(layers) > 0 {
		root = "/upper"
		for i, layer := range layers {
			layers[i] = "/" + layer
		}
		options = append(options, containerd.WithParents(layers))
	}
	_, err := containerd.Apply(context.Background(), root, os.Stdin, options...)
	return err
}
