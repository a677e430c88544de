// Package image keeps the images of one node: it pulls them from registries or
// imports them from archives and directories, verifies them, unpacks their
// layers once, and gives back the directories of which overlayfs makes a root
// filesystem.
//
// It promises:
//
//   - Every byte is verified: an image is what its digest says.
//   - A layer is on disk once, however many images and pulls share it.
//   - An image is in the store whole or not at all, also after a crash; what a
//     crash interrupted is resumed by the next pull or cleaned by Open.
//   - A hostile image is refused with a reason, and leaves nothing.
//
// On disk, below the store's directory (mode 0700, locked by one process):
//
//	lock                 held while a Store is open
//	layers/HEX/fs        one unpacked layer by diff id; layers/HEX/layer.json says how large
//	images/HEX.json      one image by digest; written last, so it is whole
//	refs/HEX.json        what a reference meant when it was last pulled
//	partial/HEX          a layer blob on its way, by digest
//	tmp/                 what is not finished; emptied by Open
//
// It never runs anything and mounts nothing. Start reading at Store.Pull.
package image
