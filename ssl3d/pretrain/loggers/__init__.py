"""The loggers that come with ssl3d; see :class:`ssl3d.pretrain.logger.Logger`."""
