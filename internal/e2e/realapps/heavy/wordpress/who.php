<?php
header('Content-Type: application/json');
echo json_encode(['pid' => getmypid(), 'hostname' => gethostname(), 'random' => mt_rand(), 'secure' => bin2hex(random_bytes(16))]);
